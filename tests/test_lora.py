"""Rewards as low-rank changes: one tree that is two models, training in all its forms, and files."""
import copy
import math
import re

import pytest
import torch
from conftest import (
    EVAL,
    EVAL_LM,
    FIXTURES,
    OLD,
    ROOT,
    TRAIN,
    TUNE_LM,
    call,
    interrupted,
    one_line,
    output,
    processes,
    read,
    same,
)

from data import files
from models import gpt, lora, weights

STORIES = FIXTURES / "stories260k"  # tied
IDS = torch.arange(3, 21).view(2, 9)
LORA = (*TUNE_LM, "--lora", "3", "--lr", "0.02", "--steps", "6", "--warmup", "0")


def trained(model, rank=3, new_head=False):
    """Returns a model with low-rank changes that are not 0, and the source in it."""
    lora.convert(model, rank, new_head, seed=1)
    random = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data += torch.randn(p.shape, generator=random) / 10
    return model, lora.Source(model)


# One tree, two models

@pytest.mark.parametrize("name, new_head", [("llama2", False), ("llama2", True), ("stories260k", True),
                                            ("stories260k", False), ("gpt2", False)])
def test_with_the_factors_off_a_model_is_the_source(name, new_head):
    """Catches: The source's output matrix is lost, an embedding is changed, or the factors stay off."""
    plain = weights.load(FIXTURES / name)
    model, source = trained(copy.deepcopy(plain), new_head=new_head)
    with torch.no_grad():
        assert source(IDS).equal(plain(IDS))
        assert not torch.allclose(model(IDS), plain(IDS), atol=0.1)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    shared = {id(p) for p in model.parameters()} - {id(p) for p in source.parameters()}
    assert shared == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        logits = model(IDS)
        for name, layer in [(k, x) for k, x in model.named_modules() if isinstance(x, lora.LowRank)]:
            model.set_submodule(name, layer.merged())
        assert torch.allclose(model(IDS), logits, atol=1e-4)


def test_a_new_output_matrix_takes_nothing_from_the_source_and_has_the_stated_size():
    lora.convert(model := weights.load(STORIES), 16, new_head=True)
    head, width = model.lm_head, model.arch["width"]
    assert head.weight is model.embed_tokens.weight
    assert head.merged().weight.detach().std() * math.sqrt(width) == pytest.approx(gpt.HEAD_STD, rel=0.05)
    full = weights.load(STORIES)
    gpt.new_output_matrix(full, 0)
    assert full.lm_head.weight.detach().std() * math.sqrt(width) == pytest.approx(gpt.HEAD_STD, rel=0.05)
    assert full.head(torch.ones(1, width)).shape == (1, full.size)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_is_that_of_merged_weights_although_the_source_runs_in_between(recompute):
    """Catches: Recomputed in backward, a block runs with the factors off."""
    model, source = trained(weights.load(FIXTURES / "llama2"))
    model.recompute = recompute
    out = model(IDS)
    with torch.no_grad():
        source(IDS)
    out.logsumexp(-1).sum().backward()
    layer = model.layers[0].mlp.down_proj
    merged = weights.load(FIXTURES / "llama2")
    for name, part in [(k, x) for k, x in model.named_modules() if isinstance(x, lora.LowRank)]:
        merged.get_submodule(name).weight.data = part.weight + part.B.detach() @ part.A.detach()
    other = merged(IDS)
    other.logsumexp(-1).sum().backward()
    gradient = merged.layers[0].mlp.down_proj.weight.grad
    assert torch.allclose(out, other, atol=1e-5)
    assert torch.allclose(layer.A.grad, layer.B.T @ gradient, atol=1e-5)
    assert torch.allclose(layer.B.grad, gradient @ layer.A.T, atol=1e-5)


# Training

@pytest.fixture
def tuned(in_texts, tmp_path):
    """Trains low-rank changes on text: tuned(name, flags) returns the file's path."""
    def run(name, *flags):
        assert call(*LORA, *flags, "--out", tmp_path / f"{name}.pt") == 0
        return tmp_path / f"{name}.pt"
    return run


def test_all_ways_to_train_give_the_same_factors(tuned, in_texts, tmp_path):
    """Catches: A resumed run has other frozen weights; compiled, the source runs with the factors on."""
    one = tuned("one", "--accum", "2")
    ways = dict(recompute=["--recompute"], chunk=["--chunk", "7"], compiled=["--compile"])
    for name, flags in ways.items():
        assert same(one, tuned(name, "--accum", "2", *flags), atol=1e-4), name
    resumed, two, half = (str(tmp_path / f"{name}.pt") for name in ("resumed", "two", "half"))
    interrupted(*LORA, "--accum", "2", "--out", resumed)
    assert read(resumed)["model"].keys() == {k for k in read(resumed)["model"] if k.endswith(lora.FACTORS)}
    assert call(*LORA, "--accum", "2", "--out", resumed, "--resume") == 0
    assert same(one, resumed)
    command = (*LORA[1:], "--recompute", "--out")
    processes(2, "train_lm", [(*command, two), (*command, half)], 3, tmp_path, cwd=in_texts.folder)
    assert same(one, two, atol=1e-4)
    assert call("train_lm.py", *command, half, "--accum", "2", "--resume") == 0
    assert same(one, half, atol=1e-4) and not same(one, tuned("start", "--lr", "1e-9"), atol=1e-2)


def test_a_tied_source_gets_an_output_matrix_of_its_own_and_learns(in_texts, tmp_path, capsys):
    """Catches: The embedding, which is the output matrix, too, changes with it, or nothing is learned."""
    flags = ("--source", STORIES, "--reward-init", "head", "--steps", "60", "--out")
    nll = []
    for more in [], ["--lora", "8", "--lr", "0.03"]:
        path = tmp_path / f"{len(more)}.pt"
        assert call(*TUNE_LM, "--lr", "5e-3", *flags, path, *more) == 0
        printed = capsys.readouterr().out
        assert ("32,768 more weights" in printed) == (not more)
        model = weights.load(path, "prt")
        assert not model.arch["tied"] and model.lm_head.weight.shape == (512, 64)
        if more:
            assert model.embed_tokens.weight.equal(weights.load(STORIES).embed_tokens.weight)
        nll.append([float(x) for x in re.findall(r"60: loss ([\d.]+)", printed)][-1])
    assert max(nll) < 1.0, nll


def test_images_train_low_rank_changes_of_all_linear_layers(paths, tmp_path, capsys):
    """Catches: With --augment, the source in the loss is the reward; or attention's matrix has no factors."""
    command = [*TRAIN.format(**paths).split(), "--lora", "2", "--lr", "0.05", "--steps", "8"]
    scores = {}
    ways = dict(plain=[], augment=["--augment"], ft=["--method", "ft"], compiled=["--compile"])
    for name, flags in ways.items():
        assert call(*command, *flags, "--out", tmp_path / f"{name}.pt") == 0
        scores[name] = re.findall(r"([\d.]+)% on the test split", capsys.readouterr().out)
    assert len({first for first, _ in scores.values()}) == 1
    assert same(tmp_path / "plain.pt", tmp_path / "compiled.pt", atol=1e-4)
    old, model = weights.load(paths["old"]), weights.load(tmp_path / "plain.pt", "prt")
    changed = [name for name, p in model.visual.named_parameters()
               if not p.equal(old.visual.get_parameter(name))]
    assert len(changed) == 8 and all(name.endswith("weight") and "resblocks" in name for name in changed)
    assert call(*EVAL.format(**paths | dict(reward=tmp_path / "plain.pt")).split()) == 0


def test_two_processes_hold_the_frozen_weights_once_between_them(tmp_path, in_texts, monkeypatch):
    """Catches: The source is another copy, or a process keeps all of the frozen weights."""
    width = dict(width=128, mlp=512, head_width=32, layers=16)
    model = gpt.GPT(weights.load(OLD).arch | width).eval()
    info = {k: v for k, v in files.read(OLD).items() if k not in ("model", "arch", "args")}
    files.save(tmp_path / "wide.pt", info | dict(arch=model.arch, model=model.state_dict()))
    (tmp_path / "measure.py").write_text(MEASURE)
    wide, x = (str(tmp_path / name) for name in ("wide.pt", "x.pt"))
    command = [*LORA[1:], "--steps", "2", "--source", wide, "--out", x]
    printed = output("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                     tmp_path / "measure.py", *command, cwd=in_texts.folder)
    held = [int(x) for x in re.findall(r"held (\d+)", printed)]
    whole = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.layers[0].parameters())
    outside = whole - 16 * block  # the embedding and the output matrix
    # A gathered block is copied into its parameters, and freed when the next one is there.
    assert len(held) == 2 and max(held) < whole / 2 + 3 * block + outside < 0.8 * whole, (held, whole, block)


MEASURE = f"""
import gc, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import SCRIPTS, torch
from models.gpt import Block
import models.lora
forward, most, calls = models.lora.LowRank.forward, [0], [0]
def measured(layer, x):
    calls[0] += 1
    if calls[0] % 23:  # looking through all objects takes a while
        return forward(layer, x)
    found = {{}}  # what is frozen and in memory, at a time when a block is gathered
    for y in gc.get_objects():
        if issubclass(type(y), torch.Tensor) and type(y).__name__ != "DTensor" and not y.is_meta:
            if not y.requires_grad and y.untyped_storage().nbytes() > 10_000:
                found[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
    most[0] = max(most[0], sum(found.values()))
    return forward(layer, x)
models.lora.LowRank.forward = measured
SCRIPTS["train_lm.py"].main()
sys.__stdout__.write(f"held {{most[0]}}\\n")
"""


# Files

def test_a_file_has_the_factors_alone_and_is_merged_in_float32_only(tuned):
    """Catches: Adding to weights in bfloat16 loses small changes."""
    path = tuned("x")
    content, model = read(path), weights.load(path, "prt")
    assert content["model"].keys() == {"factors"} and content["model"]["factors"].dtype == torch.float32
    assert not any(isinstance(module, lora.LowRank) for module in model.modules())
    apart = weights.load(path, "prt", dtype=torch.bfloat16)
    layer = apart.layers[0].mlp.down_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.A.dtype == layer.B.dtype == torch.float32
    layer.weight.data = torch.eye(*layer.weight.shape, dtype=torch.bfloat16)
    layer.A.data, layer.B.data = torch.full_like(layer.A, 1e-2), torch.full_like(layer.B, 1e-2 / 3)
    x = torch.zeros(1, layer.weight.shape[1]).bfloat16()
    x[0, 0] = 1
    assert layer(x)[0, 1] > 9e-5 and (layer.merged().weight[0, 0] - 1).abs() < 2e-4
    with torch.no_grad():
        difference = weights.load(path, "prt", dtype=torch.bfloat16)(IDS) - model(IDS)
    assert difference.abs().mean() < 0.03 < model(IDS).abs().mean()


def test_eval_adds_the_reward_of_a_small_file(tuned, table):
    small = tuned("small", "--reward-init", "head")
    model = weights.load(small, "prt")
    info = model.info | dict(tokenizer=read(OLD)["tokenizer"], arch=model.arch, model=model.state_dict())
    files.save(small.with_name("full.pt"), {k: v for k, v in info.items() if k != "lora"})
    rows = [table(*EVAL_LM, "--data", "sums.jsonl", "--reward", path)
            for path in (small, small.with_name("full.pt"))]
    for a, b in zip(*rows, strict=True):
        assert (a["nll"], a["kl"]) == pytest.approx((b["nll"], b["kl"]), abs=1e-5)
    assert rows[0][1]["kl"] > 0.01


@pytest.mark.parametrize("change, message", [
    (dict(model={}), "factors"), (dict(model=dict(factors=torch.zeros(7))), r"shape \[7\], not \[\d+\]"),
    (dict(model=dict(factors=[1.0])), "list"), (dict(lora=dict(rank=0, new_head=False)), "rank is 0"),
    (dict(lora=dict(rank=10**9, new_head=False)), "--lora 1000000000: larger than a layer"),
    (dict(lora=dict(rank=4, new_head=True)), "factors have shape"),
    (dict(source_sha256="0"), "other weights than those of"), (dict(source_sha256=None), "source_sha256"),
    (dict(source="nosuch.pt"), "nosuch.pt.*these weights: name them with --source")])
def test_a_damaged_file_or_another_source_is_refused(tuned, change, message):
    content = read(tuned("x"))
    torch.save(content | change, path := "damaged-lora.pt")
    with pytest.raises((ValueError, OSError), match=message):
        weights.load(path, "prt")


@pytest.mark.parametrize("flags, words", [
    ("--lora 2 --ticket base", "--ticket"), ("--lora 2 --reward-init random", "--reward-init"),
    ("--lora 2 --method pretrain", "pretrain"), ("--lora 0", "above 0"), ("--lora 65", "--lora 65")])
def test_flags_that_contradict_low_rank_changes_are_refused(in_texts, capfd, flags, words):
    source = [] if "pretrain" in flags else TUNE_LM[-2:]
    one_line(call(*TUNE_LM[:-2], *source, *flags.split(), "--steps", 1, "--out", "no.pt"),
             capfd.readouterr().err, words)
