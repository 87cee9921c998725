"""Tickets: masks over fixed weights, their gradient, and their files."""
import gzip
import io
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EVAL, NEW, TRAIN, TUNE_LM, call, interrupted, one_line, processes
from helpers import load, write_trap
from torch.nn.utils import parametrize

import prt
from data import files
from models import pretrain, scores, tickets, weights
from models.clip import Classifier, image_tower
from models.gpt import GPT

SETTINGS = dict(kind="random", keep=0.3, freeze=0.4, seed=5)


def ticket(n=1000, **settings):
    """Returns a MaskedWeight of n random weights."""
    generator = torch.Generator().manual_seed(0)
    return tickets.MaskedWeight(torch.randn(n, generator=generator), SETTINGS | settings, generator)


def classifier():
    torch.manual_seed(0)
    arch = pretrain.TINY
    return Classifier(arch, image_tower(arch), F.normalize(torch.randn(5, arch["embed_dim"]))).eval()


def pixels(n=4):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)


# Masks

@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("freeze", [0.0, 0.3, 0.9])
def test_the_mask_keeps_exactly_the_stated_share_also_of_a_tiny_matrix(keep, freeze):
    t = ticket(keep=keep, freeze=freeze)
    kept = (t(torch.randn(t.size)) != 0).sum()
    assert kept == round(keep * 1000)
    assert t.size == round((1 - freeze) * 1000)
    assert not freeze or t.locked.sum() == round(freeze * keep * 1000)
    for n in (1, 2, 7):
        t = ticket(n, keep=keep, freeze=freeze)
        assert t(torch.randn(t.size)).shape == (n,)


@pytest.mark.parametrize("scores", [torch.zeros(100), torch.tensor([1.0, 0.0]).repeat(50), torch.randn(100)])
def test_the_mask_is_that_of_the_highest_scores_and_of_equal_ones_the_first(scores, monkeypatch):
    """Catches: The threshold is found by kthvalue, which for 0.5 billion weights takes 39 s on a GPU."""
    monkeypatch.setattr(torch.Tensor, "kthvalue", None, raising=False)
    first = scores.argsort(descending=True, stable=True)[:30]
    assert tickets.TopK.apply(scores, 30).equal(torch.zeros(100).index_fill(0, first, 1.0))


def test_the_gradient_of_the_scores_is_the_straight_through_formula():
    """dL/ds_i = w_i dL/d(m_i w_i), for a linear layer with the loss sum((x W.T - y)^2), by hand."""
    torch.manual_seed(0)
    layer, x, y = torch.nn.Linear(6, 4, bias=False), torch.randn(9, 6), torch.randn(9, 4)
    w = layer.weight.detach().clone()
    part = tickets.MaskedWeight(w, dict(kind="base", keep=0.5, freeze=0.25), torch.Generator().manual_seed(0))
    parametrize.register_parametrization(layer, "weight", part, unsafe=True)
    scores = layer.parametrizations.weight.original
    (layer(x) - y).square().sum().backward()
    gradient = 2 * (x @ layer.weight.detach().T - y).T @ x  # of the masked weight [4, 6]
    assert torch.allclose(scores.grad, (w * gradient).flatten()[part.searched], atol=1e-5)
    assert scores.grad.abs().min() > 0  # pruned weights that are searched get a gradient, too


# Networks

@pytest.mark.parametrize("ticket, init", [("random", None), ("base", None), (None, "random")])
def test_a_source_with_the_same_weights_is_not_changed(ticket, init):
    """Catches: With --augment, the frozen source gets random statistics, or a head of random signs."""
    clip = load("openclip_rn")
    source = Classifier(clip.arch, clip.visual, torch.randn(5, clip.arch["embed_dim"]))
    for name, x in source.state_dict().items():
        if "running" in name:
            x.uniform_(0.5, 1.5)
    before = {name: x.clone() for name, x in source.state_dict().items()}
    info = dict(kind="classifier", classes=[*"abcde"])
    model = weights.build(info, source.arch, source.state_dict(), None)
    args = SimpleNamespace(ticket=ticket, reward_init=init, keep=0.5, freeze=0.0, seed=0)
    tickets.start(args, model, info, None)
    assert all(x.equal(before[name]) for name, x in source.state_dict().items())
    assert ticket == "base" or not model.visual.conv1.weight.equal(source.visual.conv1.weight)


@pytest.mark.parametrize("kind", ["random", "base"])
def test_training_moves_scores_only_and_frozen_weights_stay(kind):
    policy = classifier()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    tickets.convert(policy, SETTINGS | dict(kind=kind))
    assert all(p.requires_grad == name.endswith(".original") for name, p in policy.named_parameters())
    visual, images, labels = policy.visual, pixels(16), torch.arange(16) % 5
    start = visual.proj.detach().clone()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.5, weight_decay=0.0)
    prt.fit(policy, lambda step: torch.arange(16), lambda i, g: ((images[i],), labels[i], None), steps=8,
            warmup=0, optimizer=optimizer)
    part, end = visual.parametrizations.proj[0], visual.proj.detach()
    searched = torch.zeros(end.numel(), dtype=torch.bool).index_fill(0, part.searched, True).view_as(end)
    assert (end != start)[searched].any() and end.equal(torch.where(searched, end, start))
    assert end[~searched].ne(0).float().mean() == pytest.approx(SETTINGS["keep"], abs=0.01)
    if kind == "base":
        assert end[end != 0].equal(before["visual.proj"][end != 0])
        assert visual.ln_pre.weight.equal(before["visual.ln_pre.weight"])


@torch.no_grad()
def test_random_weights_have_one_magnitude_and_both_signs():
    """Catches: A tied embedding of +-1 is the output matrix, so that training starts from certainty."""
    model, tied = classifier(), GPT(pretrain.OLD | dict(vocab=100, end=99, tied=True))
    for network in model, tied:
        tickets.randomize(network, 0.25, torch.Generator().manual_seed(0))
    conv = model.visual.conv1.weight  # [64, 3, 8, 8]
    assert conv.abs().unique().tolist() == pytest.approx([(2 / (0.25 * 3 * 8 * 8)) ** 0.5])
    assert (conv > 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert model.visual.ln_post.weight.eq(1).all() and model.visual.ln_post.bias.eq(0).all()
    assert model.head.norm(dim=-1).tolist() == pytest.approx([1 / 0.07] * 5)
    assert 0.5 < tied(torch.arange(20)[None]).std() < 2


def test_under_bfloat16_autocast_the_scores_stay_float32_and_get_gradients():
    policy = classifier()
    tickets.convert(policy, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(pixels())
    logits.square().sum().backward()
    scores = policy.visual.parametrizations.proj.original
    assert scores.dtype == scores.grad.dtype == torch.float32 and scores.grad.abs().sum() > 0


# Files

def write(path, content):
    file = io.BytesIO()
    torch.save(content, file)
    path.write_bytes(gzip.compress(file.getvalue()))


def image_ticket(paths, *flags):
    assert call(*TRAIN.format(**paths).split(), "--ticket", *flags) == 0
    return paths["out"] / "x.pt"


def text_ticket(folder, *flags):
    """Trains a ticket on text in the folder of `texts`, and returns its path."""
    assert call(*TUNE_LM, "--steps", 2, "--warmup", 0, "--ticket", *flags, "--out", folder / "ticket.pt") == 0
    return folder / "ticket.pt"


@pytest.fixture
def fit(monkeypatch):
    """A mock of prt.fit that calls it; its first argument is the policy that is trained."""
    monkeypatch.setattr(prt, "fit", mock.Mock(wraps=prt.fit))
    return prt.fit


@pytest.mark.parametrize("fixture", [None, "openclip_rn", "openclip_convnext"])
@pytest.mark.parametrize("flags", [["random"], ["base"], ["random", "--freeze", 0.3]], ids=str)
def test_a_saved_and_loaded_image_ticket_gives_the_same_logits(paths, fit, tmp_path, fixture, flags):
    """Catches: Other random weights, a head that is not restored, or the base's BatchNorm statistics stay."""
    base = paths["old"]
    if fixture:
        clip, base = load(fixture), tmp_path / "base.pt"
        for name, x in clip.state_dict().items():
            if "running" in name:
                x.uniform_(0.5, 1.5)
        embedding = torch.randn(49408, clip.arch["text_width"])  # for real prompts
        files.save(base, dict(clip.info, arch=clip.arch | dict(vocab=49408),
                              model=clip.state_dict() | {"token_embedding.weight": embedding}))
    path, images = image_ticket(paths | dict(old=base), *flags), pixels()
    loaded, policy = weights.load(path, "prt"), fit.call_args.args[0]
    # Convolutions of the same numbers at another place in memory may differ by rounding.
    assert torch.allclose(scores.predict(loaded, images), scores.predict(policy, images), atol=1e-5)
    bits = sum(m.size for m in policy.modules() if isinstance(m, tickets.MaskedWeight))
    content = files.read(path)
    assert len(content["ticket"]["masks"]) == -(-bits // 8) and "model" not in content
    assert fixture or path.stat().st_size < bits / 8 + 2500


@pytest.mark.parametrize("kind", ["random", "base"])
def test_the_bits_of_a_ticket_are_those_of_its_scores_in_order_of_names(in_texts, fit, tmp_path, kind):
    path, ids = text_ticket(tmp_path, kind), torch.randint(0, 500, (2, 9))
    content, policy, loaded = files.read(path), fit.call_args.args[0], weights.load(path, "prt")
    assert loaded(ids).equal(policy(ids))
    bits, at, old = np.unpackbits(content["ticket"]["masks"].numpy()), 0, weights.load(content["source"])
    for name in sorted(name for name, p in old.named_parameters() if p.ndim > 1 and "embed" not in name):
        module, _, parameter = name.rpartition(".")
        part = policy.get_submodule(module).parametrizations[parameter]
        mask = tickets.TopK.apply(part.original.detach(), part[0].k)
        assert torch.from_numpy(bits[at:at + len(mask)]).float().equal(mask)
        masked = loaded.get_parameter(name)
        assert masked.ne(0).flatten().equal(mask.bool())
        assert kind == "random" or masked.equal(old.get_parameter(name) * mask.view_as(masked))
        at += len(mask)
    assert 0 <= len(bits) - at < 8


def test_a_text_ticket_answers_a_prompt_and_knows_its_tokenizer_by_its_hash(in_texts, tmp_path, capfd):
    path = text_ticket(tmp_path, "random")
    command = "eval.py", "--reward", path, "--base", NEW, "--prompt", "1 + 2 =", "--new-tokens", 4
    for flags in ([], ["--speculative"]):
        assert call(*command, *flags) == 0
        assert "base + reward (PRT):" in capfd.readouterr().out
    write(path, files.read(path) | dict(tokenizer="0" * 64))
    one_line(call(*command), capfd.readouterr().err, path, "00000000", "must have the same tokenizer")


def test_eval_takes_a_ticket_as_any_reward_and_shows_bytes(paths, table, capfd, tmp_path):
    old, full = shutil.copy(paths["old"], tmp_path / "old.pt"), paths["reward"]
    ticket = image_ticket(paths | dict(old=old), "base")
    sizes = {path: path.stat().st_size for path in (full, ticket)}
    assert f"{ticket}: {sizes[ticket]:,} bytes" in capfd.readouterr().out
    command = EVAL.format(**paths | dict(reward=ticket)).split()
    rows = {row["method"]: row["bytes"] for row in table(*command, "--reward", full, ticket)}
    assert rows["base alone"] == 0 and rows["base + sum of rewards"] == sum(sizes.values())
    assert all(rows[f"base + {path} (PRT)"] == size for path, size in sizes.items())
    assert f"{sizes[ticket]:,}" in capfd.readouterr().out
    assert all(row["bytes"] is None for row in table(*command))
    old.rename(tmp_path / "moved.pt")
    capfd.readouterr()
    one_line(call(*command), capfd.readouterr().err, old, "the file changes these weights", "--source")
    assert call(*command, "--source", tmp_path / "moved.pt") == 0
    one_line(call(*command, "--source", paths["new"]), capfd.readouterr().err, ticket,
             "--source is not the source that it was trained on")


def test_a_damaged_ticket_is_refused(paths, tmp_path):
    path = image_ticket(paths, "random", "--freeze", 0.5)
    content, data = files.read(path), path.read_bytes()
    randperm, randint = torch.randperm, torch.randint
    for name, other in (("randperm", lambda *a, **k: randperm(*a, **k).flip(0)),
                        ("randint", lambda *a, **k: 1 - randint(*a, **k))):
        with mock.patch.object(torch, name, other), pytest.raises(ValueError, match="another version of"):
            weights.load(path)
    weights.load(path)
    trap, large = (gzip.compress(x) for x in (write_trap(tmp_path).read_bytes(), bytes(10**8)))
    for damaged, message in [(data[:500], "ended"), (data[:-4] + b"1234", "length"), (trap, ""),
                             (large, "expands to more than")]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"x.pt: .*{message}"):
            weights.load(path)
    assert not (tmp_path / "trapped").exists()
    size, arch = len(content["ticket"]["masks"]), content["arch"]
    edited = [(dict(arch=arch | dict(layers=10**9)), "layers"),
              (dict(arch=arch | dict(image_size=10**6)), "weights, of which only")]
    edited += [(dict(ticket=content["ticket"] | change), message) for change, message in [
        (dict(masks=[1, 2]), ""), (dict(masks=torch.zeros(size, dtype=torch.int8)), f"masks of {size} bytes"),
        (dict(freeze=0.9), f"masks of {size} bytes for a network that needs 1434"),
        (dict(freeze=1.0), "freeze is 1.0"), (dict(keep=0.0), "keep is 0.0"), (dict(seed="x"), ""),
        (dict(kind="golden"), "kind is 'golden'"), (dict(seed=1), "another version of torch"),
        (dict(keep=0.4), "another version of torch")]]
    for change, message in edited:
        write(path, content | change)
        with pytest.raises(ValueError, match=f"x.pt: not a supported model or checkpoint: .*{message}"):
            weights.load(path)


# Runs

def agreement(a, b):
    """Returns the share of the bits that are the same in the masks of two files."""
    bits = [np.unpackbits(files.read(path)["ticket"]["masks"].numpy()) for path in (a, b)]
    return (bits[0] == bits[1]).mean()


def test_an_unfinished_ticket_is_no_model_and_does_not_resume_over_other_weights(paths, tmp_path, capfd):
    old = shutil.copy(paths["old"], tmp_path / "old.pt")
    command = *TRAIN.format(**paths | dict(old=old)).split(), "--ticket", "base"
    interrupted(*command)
    with pytest.raises(ValueError,
                       match="x.pt: .*an unfinished run, of 1 steps so far: continue it with --resume"):
        weights.load(paths["out"] / "x.pt", "prt")
    shutil.copy(paths["new"], old)
    capfd.readouterr()
    one_line(call(*command, "--resume"), capfd.readouterr().err, "--resume", "x.pt", "its source changed")


@pytest.mark.parametrize("script", ["train_vision", "train_lm"])
def test_two_processes_train_the_ticket_of_one_and_one_resumes_it(paths, in_texts, tmp_path, script):
    """Catches: With sharded scores, each process keeps the highest scores of its own shard."""
    flags = TRAIN.format(**paths).split()[1:] if script == "train_vision" else TUNE_LM[1:]
    flags = [*flags, "--steps", "4", "--accum", "4", "--ticket", "random", "--freeze", "0.3", "--lr", "0.1",
             "--warmup", "0", "--out"]
    one, start, two, half = (str(tmp_path / f"{name}.pt") for name in ("one", "start", "two", "half"))
    processes(2, script, [[*flags, two], [*flags, half]], 2, tmp_path, cwd=in_texts.folder)
    for more in [one], [half, "--resume"], [start, "--lr", "1e-9"]:
        assert call(f"{script}.py", *flags, *more) == 0
    assert agreement(one, two) > 0.999 and agreement(one, half) > 0.999
    assert agreement(one, start) < 0.99
    assert weights.load(two, "prt").info["ticket"]["freeze"] == 0.3


def test_compiled_training_gives_the_same_ticket_and_files_of_it_the_same_bytes(paths):
    path, eager = paths["out"] / "x.pt", paths["out"] / "eager.pt"
    for flags in [], [], ["--compile"]:
        image_ticket(paths, "base", *flags)
        if not flags and eager.exists():
            assert path.read_bytes() == eager.read_bytes() and path.read_bytes()[4:8] == bytes(4)
        assert not eager.exists() or agreement(path, eager) > 0.999
        path.rename(eager)


def test_a_reward_from_random_weights_does_not_start_as_the_source(paths, in_texts, tmp_path):
    for command in TRAIN.format(**paths).split(), TUNE_LM:
        models = []
        for init in [], ["--reward-init", "random"]:
            path = tmp_path / f"{command[0]}-{len(init)}.pt"
            flags = [*init, "--steps", 2, "--warmup", 0, "--seed", 7, "--lr", "1e-9", "--out", path]
            assert call(*command, *flags) == 0
            models.append(weights.load(path, "prt"))
        copied, new = (dict(model.named_parameters()) for model in models)
        assert all((p - new[name]).abs().max() > 0.01 for name, p in copied.items() if p.ndim > 1)
