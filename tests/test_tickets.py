"""Tickets: masks over fixed weights, their gradient, and their files."""
import gzip
import io
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tickets as measure
import torch
import torch.nn.functional as F
from conftest import EVAL, FIXTURES, NEW, OLD, TRAIN, call, call_main, interrupt, one_line, two_processes
from PIL import Image
from torch.nn.utils import parametrize

import prt
from data import files
from models import pretrain, scores, tickets, weights
from models.clip import Classifier
from models.gpt import GPT

TUNE_LM = ("--source", OLD, "--data", "sums.jsonl", "--steps", "2", "--batch", "8", "--accum", "1",
           "--warmup", "0")
SETTINGS = dict(kind="random", keep=0.3, freeze=0.4, seed=5)


def ticket(n=1000, **settings):
    """Returns a MaskedWeight of n random weights."""
    generator = torch.Generator().manual_seed(0)
    return tickets.MaskedWeight(torch.randn(n, generator=generator), SETTINGS | settings, generator)


def classifier():
    torch.manual_seed(0)
    arch = pretrain.TINY
    return Classifier(arch, weights.image_tower(arch), F.normalize(torch.randn(5, arch["embed_dim"]))).eval()


def pixels(n=4):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)


# Masks

@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("freeze", [0.0, 0.3, 0.9])
def test_the_mask_keeps_exactly_the_stated_share(keep, freeze):
    t = ticket(keep=keep, freeze=freeze)
    kept = (t(torch.randn(t.size)) != 0).sum()
    assert kept == round(keep * 1000)
    assert t.size == round((1 - freeze) * 1000)
    assert not freeze or t.locked.sum() == round(freeze * keep * 1000)


@pytest.mark.parametrize("scores", [torch.zeros(100), torch.tensor([1.0, 0.0]).repeat(50), torch.randn(100)],
                         ids=["equal", "two", "different"])
def test_the_mask_is_that_of_the_highest_scores_and_of_equal_ones_the_first(scores):
    """Catches: All scores that equal the threshold are kept, as with >=."""
    first = scores.argsort(descending=True, stable=True)[:30]
    assert tickets.TopK.apply(scores, 30).equal(torch.zeros(100).index_fill(0, first, 1.0))


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("freeze", [0.0, 0.5, 0.99])
def test_a_tiny_matrix_has_a_mask_too(n, freeze):
    t = ticket(n, keep=0.1, freeze=freeze)
    assert t(torch.randn(t.size)).shape == (n,)


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

@pytest.mark.parametrize("kind", ["random", "base"])
def test_training_moves_scores_only_and_frozen_weights_stay(kind):
    policy = classifier()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    tickets.convert(policy, SETTINGS | dict(kind=kind))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if name.endswith(".original")}
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


def test_random_weights_have_one_magnitude_and_both_signs():
    model = classifier()
    tickets.randomize(model, 0.25, torch.Generator().manual_seed(0))
    conv = model.visual.conv1.weight  # [64, 3, 8, 8]
    assert conv.abs().unique().tolist() == pytest.approx([(2 / (0.25 * 3 * 8 * 8)) ** 0.5])
    assert (conv > 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert model.visual.ln_post.weight.eq(1).all() and model.visual.ln_post.bias.eq(0).all()
    assert model.head.norm(dim=-1).tolist() == pytest.approx([1 / 0.07] * 5)


def test_tied_embeddings_give_logits_that_are_not_loud():
    """Catches: An embedding of +-1 is the output matrix, so that training starts from certainty."""
    model = GPT(pretrain.OLD | dict(vocab=100, end=99, tied=True))
    tickets.randomize(model, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.5 < model(torch.arange(20)[None]).std() < 2


def test_under_bfloat16_autocast_the_scores_stay_float32_and_get_gradients():
    policy = classifier()
    tickets.convert(policy, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(pixels())
    logits.square().sum().backward()
    scores = policy.visual.parametrizations.proj.original
    assert scores.dtype == scores.grad.dtype == torch.float32 and scores.grad.abs().sum() > 0


# Files

def read(path):
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)


def image_ticket(paths, *flags, **other):
    """Trains a ticket on images, and returns its path."""
    assert call(*TRAIN.format(**paths | other).split(), "--ticket", *flags) == 0
    return paths["out"] / "x.pt"


def text_ticket(folder, *flags):
    """Trains a ticket on text in the folder of `texts`, and returns its path."""
    assert call("train_lm.py", *TUNE_LM, "--ticket", *flags, "--out", folder / "ticket.pt") == 0
    return folder / "ticket.pt"


@pytest.fixture
def trained(monkeypatch):
    """The policies that prt.fit has trained."""
    policies, fit = [], prt.fit
    monkeypatch.setattr(prt, "fit", lambda policy, *args, **options: (
        policies.append(policy) or fit(policy, *args, **options)))
    return policies


@pytest.mark.parametrize("fixture", [None, "openclip_rn", "openclip_convnext"])
@pytest.mark.parametrize("flags", [["random"], ["base"], ["random", "--freeze", 0.3]], ids=str)
def test_a_saved_and_loaded_image_ticket_gives_the_same_logits(paths, trained, tmp_path, fixture, flags):
    """Catches: Other random weights, a head that is not restored, or the base's BatchNorm statistics stay."""
    base = paths["old"]
    if fixture:
        clip, base = weights.load(FIXTURES / fixture, "base"), tmp_path / "base.pt"
        for name, x in clip.state_dict().items():
            if "running" in name:
                x.uniform_(0.5, 1.5)
        embedding = torch.randn(49408, clip.arch["text_width"])  # for real prompts
        files.save(base, dict(clip.info, arch=clip.arch | dict(vocab=49408),
                              model=clip.state_dict() | {"token_embedding.weight": embedding}))
    path, images = image_ticket(paths, *flags, old=base), pixels()
    loaded, (policy,) = weights.load(path, "prt"), trained
    # Convolutions of the same numbers at another place in memory may differ by rounding.
    assert torch.allclose(scores.predict(loaded, images), scores.predict(policy, images), atol=1e-5)
    bits = sum(m[0].size for m in policy.modules() if isinstance(m, parametrize.ParametrizationList))
    assert len(read(path)["ticket"]["masks"]) == -(-bits // 8) and "model" not in read(path)
    assert fixture or path.stat().st_size < bits / 8 + 2500


@pytest.mark.parametrize("kind", ["random", "base"])
def test_the_bits_of_a_ticket_are_those_of_its_scores_in_order_of_names(in_texts, trained, tmp_path, kind):
    path, ids = text_ticket(tmp_path, kind), torch.randint(0, 500, (2, 9))
    (policy,), loaded, old = trained, weights.load(path, "prt"), weights.load(OLD)
    assert loaded(ids).equal(policy(ids))
    bits, at = np.unpackbits(read(path)["ticket"]["masks"].numpy()), 0
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


def test_eval_takes_a_ticket_as_any_reward_and_shows_bytes(paths, table, capsys):
    ticket, full = image_ticket(paths, "base"), paths["reward"]
    assert f"{ticket}: {ticket.stat().st_size:,} bytes" in capsys.readouterr().out
    command = EVAL.format(**paths).split()
    rows = {row["method"]: row for row in table(*command, "--reward", full, ticket)}
    sizes = {path: path.stat().st_size for path in (ticket, full)}
    assert [rows[f"base + {path} (PRT)"]["bytes"] for path in (full, ticket)] == [sizes[full], sizes[ticket]]
    assert rows["base + sum of rewards"]["bytes"] == sum(sizes.values()) and rows["base alone"]["bytes"] == 0
    assert f"{sizes[ticket]:,}" in capsys.readouterr().out
    assert all(row["bytes"] is None for row in table(*command, "--reward", ticket))


def test_a_text_ticket_answers_a_prompt_and_knows_its_tokenizer_by_its_hash(in_texts, tmp_path, capfd):
    """Catches: A ticket is added to a base whose tokens mean something else."""
    path = text_ticket(tmp_path, "random")
    command = "eval.py", "--reward", path, "--base", NEW, "--prompt", "1 + 2 =", "--new-tokens", 4
    for flags in ([], ["--speculative"]):
        capfd.readouterr()
        assert call(*command, *flags) == 0
        assert "base + reward (PRT):" in capfd.readouterr().out
    files.save(path, read(path) | dict(tokenizer="0" * 64), compress=True)
    one_line(call(*command), capfd.readouterr().err, path, "00000000", "must have the same tokenizer")


def test_a_ticket_without_its_source_base_names_the_flag_that_finds_it(paths, capfd, tmp_path):
    old = shutil.copy(paths["old"], tmp_path / "old.pt")
    path = image_ticket(paths, "base", old=old)
    command = EVAL.format(**paths | dict(reward=path)).split()
    assert call(*command) == 0
    old.rename(tmp_path / "moved.pt")
    capfd.readouterr()
    one_line(call(*command), capfd.readouterr().err, old, "a ticket is a mask", "--source")
    assert call(*command, "--source", tmp_path / "moved.pt") == 0
    one_line(call(*command, "--source", paths["new"]), capfd.readouterr().err, path, "new.pt is not", "--source")


def test_a_damaged_ticket_is_refused(paths):
    path = image_ticket(paths, "random")
    content, size = read(path), len(read(path)["ticket"]["masks"])
    edited = [(dict(arch=content["arch"] | dict(layers=10**9)), "layers"),
              (dict(arch=content["arch"] | dict(image_size=10**6)), "weights, of which only")]
    for change, message in [
            (dict(masks=torch.zeros(10, dtype=torch.uint8)), "masks of 10 bytes"), (dict(masks=[1, 2]), ""),
            (dict(masks=torch.zeros(size, dtype=torch.int8)), f"masks of {size} bytes"),
            (dict(freeze=0.9), f"masks of {size} bytes for a network that needs 1434"),
            (dict(freeze=1.0), "freeze 1.0"), (dict(keep=0.0), "keep 0.0"), (dict(keep="x"), ""),
            (dict(kind="golden"), "kind 'golden'"), (dict(seed="x"), ""),
            (dict(checksum="0"), "another version of torch"), (dict(seed=1), "another version of torch"),
            (dict(keep=0.4), "another version of torch")]:
        edited.append((dict(ticket=content["ticket"] | change), message))
    for change, message in edited:
        files.save(path, content | change, compress=True)
        with pytest.raises(ValueError, match=f"x.pt: not a supported model or checkpoint: .*{message}"):
            weights.load(path)


def test_another_random_number_generator_is_noticed(paths, monkeypatch):
    """Catches: The checksum does not depend on the random weights, or not on the frozen ones."""
    path, randperm, randint = image_ticket(paths, "random", "--freeze", 0.5), torch.randperm, torch.randint
    for name, other in (("randperm", lambda *a, **k: randperm(*a, **k).flip(0)),
                        ("randint", lambda *a, **k: 1 - randint(*a, **k))):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, other)
            with pytest.raises(ValueError, match="another version of torch, or of this code, made"):
                weights.load(path)
    weights.load(path)


# Runs

def agreement(a, b):
    """Returns the share of the bits that are the same in the masks of two files."""
    bits = [np.unpackbits(read(path)["ticket"]["masks"].numpy()) for path in (a, b)]
    return (bits[0] == bits[1]).mean()


def test_a_ticket_does_not_resume_over_other_weights(paths, tmp_path, monkeypatch, capfd):
    old = shutil.copy(paths["old"], tmp_path / "old.pt")
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            image_ticket(paths, "base", old=old)
    assert weights.load(paths["out"] / "x.pt", "prt").info["step"] == 1
    shutil.copy(paths["new"], old)
    capfd.readouterr()
    command = TRAIN.format(**paths | dict(old=old)).split()
    one_line(call(*command, "--ticket", "base", "--resume"), capfd.readouterr().err, "--resume", "x.pt",
             "other weights")


@pytest.mark.parametrize("script", ["train_vision", "train_lm"])
def test_two_processes_train_the_ticket_of_one_and_one_resumes_it(paths, in_texts, tmp_path, script):
    """Catches: With sharded scores, each process keeps the highest scores of its own shard."""
    flags = TRAIN.format(**paths).split()[1:] if script == "train_vision" else TUNE_LM
    flags = [*flags, "--steps", "4", "--accum", "4", "--ticket", "random", "--freeze", "0.3", "--lr", "0.1",
             "--out"]
    one, start, two, half = (str(tmp_path / f"{name}.pt") for name in ("one", "start", "two", "half"))
    two_processes(script, [[*flags, two], [*flags, half]], 2, tmp_path, cwd=in_texts.folder)
    assert call(f"{script}.py", *flags, one) == 0
    assert call(f"{script}.py", *flags, half, "--resume") == 0
    assert call(f"{script}.py", *flags, start, "--lr", "1e-9") == 0
    one, start, two, half = map(Path, (one, start, two, half))
    assert agreement(one, two) > 0.999 and agreement(one, half) > 0.999
    assert agreement(one, start) < 0.99
    assert weights.load(two, "prt").info["ticket"]["freeze"] == 0.3


def test_compiled_training_gives_the_same_ticket(paths):
    eager = shutil.copy(image_ticket(paths, "base"), paths["out"] / "eager.pt")
    paths["out"].joinpath("x.pt").unlink()
    assert agreement(eager, image_ticket(paths, "base", "--compile")) > 0.999


@pytest.mark.parametrize(("flags", "words"), [
    (["--keep", 0.5], ["--keep and --freeze", "--ticket"]),
    (["--freeze", 0.5], ["--keep and --freeze", "--ticket"]),
    (["--ticket", "base", "--reward-init", "random"], ["--reward-init"]),
    (["--ticket", "base", "--method", "pretrain"], ["--ticket", "pretrain"]),
    (["--reward-init", "random", "--method", "ft"], ["--reward-init", "ft"]),
    (["--ticket", "base", "--keep", 1], ["--keep", "below 1"]),
    (["--ticket", "golden"], ["--ticket", "golden"]),
])
def test_flags_that_make_no_ticket_are_refused_in_one_line(paths, capfd, flags, words):
    one_line(call(*TRAIN.format(**paths).split(), *flags), capfd.readouterr().err, *words)
    assert not (paths["out"] / "x.pt").exists()


@pytest.mark.parametrize("script", ["train_vision.py", "train_lm.py"])
def test_a_ticket_without_a_base_is_refused(script, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(call(script, "--ticket", "base"), capfd.readouterr().err, "--ticket", "--base")


def test_a_reward_from_random_weights_does_not_start_as_the_base(paths, in_texts, tmp_path):
    """Catches: --reward-init random is taken as a path, or changes nothing."""
    for script, flags in dict(train_vision=TRAIN.format(**paths).split()[1:], train_lm=TUNE_LM).items():
        models = []
        for name, init in dict(copied=[], new=["--reward-init", "random"]).items():
            path = tmp_path / f"{script}-{name}.pt"
            assert call(f"{script}.py", *flags, *init, "--seed", 7, "--lr", "1e-9", "--out", path) == 0
            models.append(weights.load(path, "prt"))
        copied, new = (dict(model.named_parameters()) for model in models)
        assert all((p - new[name]).abs().max() > 0.01 for name, p in copied.items() if p.ndim > 1)


# The measurements

def test_the_table_of_classification_and_its_picture(in_shapes, tmp_path, monkeypatch, capsys):
    """Catches: tests/tickets.py no longer runs, or prunes as many weights as it freezes."""
    for name in ("FREEZE", "KEEP"):
        monkeypatch.setattr(measure, name, (0.5,))
    picture = tmp_path / "x.png"
    command = "tickets.py", "classification", "--steps", 2, "--seeds", 0, "--out", tmp_path
    assert call_main(measure.main, *command, "--picture", picture) == 0
    rows = dict(re.findall(r"^(\w.*?)  +([\d,]+) bytes", capsys.readouterr().out, re.M))
    sizes = {name: int(size.replace(",", "")) for name, size in rows.items()}
    assert sizes["trained weights, float32"] > 30 * sizes["ticket, keep 0.5"]
    assert abs(sizes["ticket, keep 0.5, freeze 0.5"] - sizes["randomly pruned 0.5, keep 0.5"]) < 50
    assert sizes["ticket, keep 0.5"] - sizes["ticket, keep 0.5, freeze 0.5"] == pytest.approx(7168, abs=100)
    assert Image.open(picture).size == (660, 400)


def test_randomly_pruned_weights_are_never_locked():
    with mock.patch.object(tickets, "counts", measure.randomly_pruned):
        t = ticket(keep=0.3, freeze=0.4)
    assert t.locked.sum() == 0 and len(t.searched) == 600 and t.k == 180


def test_the_table_of_rewards(in_shapes, tmp_path, monkeypatch, capfd):
    flags = "--steps 2 --batch 8 --warmup 0 --ticket"
    rewards = dict(ticket_base=f"{flags} base", ticket_random=f"{flags} random")
    monkeypatch.setitem(measure.REWARDS, "shapes", rewards)
    shutil.copytree("out", tmp_path / "out")
    monkeypatch.setenv("PRT_CACHE", str(in_shapes.cache))
    assert call_main(measure.main, "tickets.py", "shapes", "--seeds", 0, "--out", tmp_path / "out") == 0
    rows = re.findall(r"^(\w+) +[\d,]+ bytes \( *([\d.]+) times smaller\)", capfd.readouterr().out, re.M)
    assert [name for name, _ in rows] == ["reward", "reward_bfloat16", "ticket_base", "ticket_random"]
    assert [round(float(times)) for _, times in rows[:2]] == [1, 2] and float(rows[2][1]) > 25
