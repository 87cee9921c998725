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
import train_lm
import train_vision
from data import files
from models import runs, tickets, weights
from models.clip import Classifier
from models.gpt import GPT

TUNE_LM = ("--base", OLD, "--data", "sums.jsonl", "--steps", "2", "--batch", "8", "--accum", "1",
           "--warmup", "0")
SETTINGS = dict(kind="random", keep=0.3, freeze=0.4, seed=5)


def ticket(n=1000, seed=0, **settings):
    """Returns a MaskedWeight of n random weights."""
    generator = torch.Generator().manual_seed(seed)
    return tickets.MaskedWeight(torch.randn(n, generator=generator), SETTINGS | settings, generator)


# Masks

@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("freeze", [0.0, 0.3, 0.5, 0.9])
def test_the_mask_keeps_exactly_the_stated_share(keep, freeze):
    t = ticket(keep=keep, freeze=freeze)
    scores = torch.randn(t.size)
    kept = (t(scores) != 0).sum()
    assert kept == round(keep * 1000)
    assert t.size == round((1 - freeze) * 1000)
    assert not freeze or t.locked.sum() == round(freeze * keep * 1000)


@pytest.mark.parametrize("scores", [torch.zeros(100), torch.tensor([1.0, 0.0]).repeat(50)])
def test_the_mask_keeps_exactly_its_share_of_equal_scores(scores):
    """Catches: All scores that equal the threshold are kept, as with >=."""
    mask = tickets.TopK.apply(scores, 30)
    assert mask.sum() == 30
    assert mask.equal(tickets.TopK.apply(scores, 30))
    first = scores.argsort(descending=True, stable=True)[:30]
    assert mask[first].all()


def test_the_mask_is_that_of_the_highest_scores():
    scores = torch.randn(500)
    mask = tickets.TopK.apply(scores, 123)
    assert mask.sum() == 123 and scores[mask == 1].min() > scores[mask == 0].max()


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
    masked = layer.weight.detach()
    gradient = 2 * (x @ masked.T - y).T @ x  # of the masked weight [4, 6]
    assert torch.allclose(scores.grad, (w * gradient).flatten()[part.searched], atol=1e-5)
    assert scores.grad.abs().min() > 0  # pruned weights that are searched get a gradient, too


# Networks

def classifier(seed=0):
    torch.manual_seed(seed)
    arch = train_vision.TINY
    return Classifier(arch, weights.image_tower(arch), F.normalize(torch.randn(5, arch["embed_dim"]))).eval()


@pytest.mark.parametrize("kind", ["random", "base"])
def test_training_moves_scores_only_and_frozen_weights_stay(kind):
    policy = classifier()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    tickets.convert(policy, SETTINGS | dict(kind=kind))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if name.endswith(".original")}
    visual = policy.visual
    start = visual.proj.detach().clone()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.5, weight_decay=0.0)
    data = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 5
    prt.fit(policy, lambda step: torch.arange(16), lambda i, g: ((data[0][i],), data[1][i], None), steps=8,
            warmup=0, optimizer=optimizer)
    part, end = visual.parametrizations.proj[0], visual.proj.detach()
    searched = torch.zeros(end.numel(), dtype=torch.bool).index_fill(0, part.searched, True).view_as(end)
    assert (end != start)[searched].any() and end.equal(torch.where(searched, end, start))
    assert end[~searched].ne(0).float().mean() == pytest.approx(SETTINGS["keep"], abs=0.01)
    if kind == "base":
        kept = end != 0
        assert end[kept].equal(before["visual.proj"][kept])
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
    model = GPT(train_lm.OLD | dict(vocab=100, end=99, tied=True))
    tickets.randomize(model, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.5 < model(torch.arange(20)[None]).std() < 2


# Files

def read(path):
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)


def edit(path, **changes):
    """Replaces entries of a ticket's file; those of its settings are named ticket_..."""
    content = read(path)
    for name, value in changes.items():
        inner = content["ticket"] if name.startswith("ticket_") else content
        inner[name.removeprefix("ticket_")] = value
    files.save(path, content, compress=True)


def text_ticket(folder, *flags):
    """Trains a ticket on text in the folder of `texts`, and returns its path."""
    path = folder / "ticket.pt"
    assert call("train_lm.py", *TUNE_LM, *flags, "--out", path) == 0
    return path


@pytest.fixture
def trained(monkeypatch):
    """The policies that prt.fit has trained."""
    policies, fit = [], prt.fit

    def fit_and_keep(policy, *args, **options):
        policies.append(policy)
        return fit(policy, *args, **options)

    monkeypatch.setattr(prt, "fit", fit_and_keep)
    return policies


@pytest.mark.parametrize("kind", ["random", "base"])
@pytest.mark.parametrize("freeze", [[], ["--freeze", 0.3]])
def test_a_saved_and_loaded_image_ticket_gives_the_same_logits(paths, trained, capsys, kind, freeze):
    """Catches: Another order of the masks, other random weights, or a head that is not restored."""
    path = paths["out"] / "x.pt"
    assert call(*TRAIN.format(**paths).split(), "--ticket", kind, "--keep", 0.4, *freeze) == 0
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    loaded, (policy,) = weights.load(path, "prt"), trained
    assert runs.predict(loaded, images).equal(runs.predict(policy, images))
    assert f"{path}: {path.stat().st_size:,} bytes" in capsys.readouterr().out
    content = read(path)
    bits = sum(m[0].size for m in policy.modules() if isinstance(m, parametrize.ParametrizationList))
    assert len(content["ticket"]["masks"]) == -(-bits // 8)
    assert path.stat().st_size < bits / 8 + 2500 and "model" not in content


@pytest.mark.parametrize("kind", ["random", "base"])
def test_a_saved_and_loaded_text_ticket_gives_the_same_logits(in_texts, trained, tmp_path, kind):
    loaded, (policy,) = weights.load(text_ticket(tmp_path, "--ticket", kind), "prt"), trained
    ids = torch.randint(0, 500, (2, 9))
    with torch.no_grad():
        assert loaded(ids).equal(policy(ids))


@pytest.mark.parametrize("kind", ["random", "base"])
@pytest.mark.parametrize("fixture", ["openclip_rn", "openclip_convnext"])
def test_a_convolutional_ticket_gives_the_same_logits(paths, trained, tmp_path, kind, fixture):
    """Catches: A random ticket of a ResNet keeps the base's BatchNorm statistics, which its file lacks."""
    clip, base = weights.load(FIXTURES / fixture, "base"), tmp_path / "base.pt"
    for name, x in clip.state_dict().items():
        if "running" in name:
            x.uniform_(0.5, 1.5)
    state = dict(clip.info, arch=clip.arch | dict(vocab=49408), model=clip.state_dict())
    state["model"]["token_embedding.weight"] = torch.randn(49408, clip.arch["text_width"])  # for real prompts
    files.save(base, state)
    command = TRAIN.format(**paths | dict(old=base)).split()
    assert call(*command, "--ticket", kind) == 0
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    loaded, (policy,) = weights.load(paths["out"] / "x.pt", "prt"), trained
    # Convolutions of the same numbers at another place in memory may differ by rounding.
    assert torch.allclose(runs.predict(loaded, images), runs.predict(policy, images), atol=1e-5)


def test_pack_and_unpack_are_inverse(in_texts, trained, tmp_path):
    """The bits of each matrix are those of its scores, in the order of the names."""
    path = text_ticket(tmp_path, "--ticket", "base")
    (policy,), loaded, old = trained, weights.load(path), weights.load(OLD)
    bits, at = np.unpackbits(read(path)["ticket"]["masks"].numpy()), 0
    for name in sorted(name for name, p in old.named_parameters() if p.ndim > 1 and "embed" not in name):
        module, _, parameter = name.rpartition(".")
        part = policy.get_submodule(module).parametrizations[parameter]
        mask = tickets.TopK.apply(part.original.detach(), part[0].k)
        assert torch.from_numpy(bits[at:at + len(mask)]).float().equal(mask)
        w = old.get_parameter(name)
        assert loaded.get_parameter(name).equal(w * mask.view_as(w))
        at += len(mask)
    assert 0 <= len(bits) - at < 8


def test_the_same_run_writes_the_same_bytes(paths):
    """Catches: The time of day, or the file's temporary name, in the compressed file."""
    a, b = (paths["out"] / name for name in ("a.pt", "b.pt"))
    for path in (a, b):
        assert call(*TRAIN.format(**paths).split(), "--ticket", "random", "--out", path) == 0
    assert a.read_bytes() == b.read_bytes()
    assert a.read_bytes()[4:8] == bytes(4)  # gzip's field for the time


def test_eval_takes_a_ticket_as_any_reward_and_shows_bytes(paths, table, capsys):
    ticket, full = paths["out"] / "x.pt", paths["reward"]
    assert call(*TRAIN.format(**paths).split(), "--ticket", "base") == 0
    command = EVAL.format(**paths).split()
    rows = {row["method"]: row for row in table(*command, "--reward", full, ticket)}
    sizes = {path: path.stat().st_size for path in (ticket, full)}
    assert [rows[f"base + {path} (PRT)"]["bytes"] for path in (full, ticket)] == [sizes[full], sizes[ticket]]
    assert rows["base + sum of rewards"]["bytes"] == sum(sizes.values()) and rows["base alone"]["bytes"] == 0
    assert f"{sizes[ticket]:,}" in capsys.readouterr().out
    assert all(row["bytes"] is None for row in table(*command, "--reward", ticket))


@pytest.mark.parametrize("flags", [[], ["--speculative"]])
def test_a_text_ticket_answers_a_prompt(in_texts, tmp_path, capsys, flags):
    path = text_ticket(tmp_path, "--ticket", "random")
    command = "eval.py", "--reward", path, "--base", NEW, "--prompt", "1 + 2 =", "--new-tokens", 4
    assert call(*command, *flags) == 0
    assert "base + reward (PRT):" in capsys.readouterr().out


def test_a_ticket_is_a_reward_processor(in_texts, tmp_path):
    reward, new = weights.load(text_ticket(tmp_path, "--ticket", "base")), weights.load(NEW)
    ids = torch.randint(0, 500, (2, 7))
    with torch.no_grad():
        scores = new(ids)[:, -1]
        expected = prt.mixture(new, [(1.0, reward)], lambda policy: policy(ids)[:, -1])
    assert torch.allclose(prt.RewardProcessor(reward)(ids, scores), expected, atol=1e-5)


def test_a_ticket_without_its_source_base_names_the_flag_that_finds_it(paths, capfd, tmp_path):
    path, old = paths["out"] / "x.pt", tmp_path / "old.pt"
    old.write_bytes(paths["old"].read_bytes())
    assert call(*TRAIN.format(**paths | dict(old=old)).split(), "--ticket", "base") == 0
    command = EVAL.format(**paths | dict(reward=path)).split()
    assert call(*command) == 0
    old.rename(tmp_path / "moved.pt")
    capfd.readouterr()
    one_line(call(*command), capfd.readouterr().err, old, "a ticket is a mask", "--ref")
    assert call(*command, "--ref", tmp_path / "moved.pt") == 0
    one_line(call(*command, "--ref", paths["new"]), capfd.readouterr().err, path, "new.pt is not", "--ref")


def test_a_text_ticket_knows_its_tokenizer_by_its_hash(in_texts, tmp_path, capfd):
    """Catches: A ticket is added to a base whose tokens mean something else."""
    path = text_ticket(tmp_path, "--ticket", "random")
    edit(path, tokenizer="0" * 64)
    capfd.readouterr()
    one_line(call("eval.py", "--reward", path, "--base", NEW, "--prompt", "1 + 2 ="), capfd.readouterr().err,
             path, "00000000", "must have the same tokenizer")


@pytest.mark.parametrize(("changes", "message"), [
    (dict(ticket_masks=torch.zeros(10, dtype=torch.uint8)), "masks of 10 bytes"),
    (dict(ticket_masks=torch.zeros(14336, dtype=torch.int8)), "masks of 14336 bytes"),
    (dict(ticket_masks=[1, 2]), "not a supported model or checkpoint"),
    (dict(ticket_checksum="0"), "another version of torch"),
    (dict(ticket_seed=1), "another version of torch"),
    (dict(ticket_seed="x"), "not a supported model or checkpoint"),
    (dict(ticket_kind="golden"), "kind 'golden'"),
    (dict(ticket_keep=0.0), "keep 0.0"),
    (dict(ticket_keep=0.4), "another version of torch"),
    (dict(ticket_freeze=1.0), "freeze 1.0"),
    (dict(ticket_freeze=0.9), "masks of 14336 bytes for a network that needs 1434"),
    (dict(ticket_keep="x"), "not a supported model or checkpoint"),
    (dict(ticket={}), "not a supported model or checkpoint"),
    (dict(arch=train_vision.TINY | dict(layers=10**9)), "layers"),
    (dict(arch=train_vision.TINY | dict(image_size=10**6)), "weights, of which only"),
])
def test_a_damaged_ticket_is_refused_in_one_line(paths, capfd, changes, message):
    path = paths["out"] / "x.pt"
    assert call(*TRAIN.format(**paths).split(), "--ticket", "random") == 0
    edit(path, **changes)
    capfd.readouterr()
    one_line(call(*EVAL.format(**paths | dict(reward=path)).split()), capfd.readouterr().err, path, message)


@pytest.mark.parametrize("damage, words", [
    (lambda data: data[:500], "ended"), (lambda data: data[:-4] + b"1234", "length"),
    (lambda data: gzip.compress(bytes(10**8)), "expands to more than")])
def test_a_damaged_compressed_file_is_refused_in_one_line(paths, capfd, damage, words):
    """Catches: A file of a few bytes that expands to gigabytes is expanded."""
    path = paths["out"] / "x.pt"
    assert call(*TRAIN.format(**paths).split(), "--ticket", "random") == 0
    path.write_bytes(damage(path.read_bytes()))
    capfd.readouterr()
    one_line(call(*EVAL.format(**paths | dict(reward=path)).split()), capfd.readouterr().err, path, words)


def test_another_random_number_generator_is_noticed(paths, capfd, monkeypatch):
    """Catches: The checksum does not depend on the random weights, or not on the frozen ones."""
    path, randperm, randint = paths["out"] / "x.pt", torch.randperm, torch.randint
    assert call(*TRAIN.format(**paths).split(), "--ticket", "random", "--freeze", 0.5) == 0
    for name, other in (("randperm", lambda *a, **k: randperm(*a, **k).flip(0)),
                        ("randint", lambda *a, **k: 1 - randint(*a, **k))):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, other)
            with pytest.raises(ValueError, match="another version of torch, or of this code, made"):
                weights.load(path)
    weights.load(path)


# Runs

def test_a_ticket_resumes_bit_for_bit(paths, monkeypatch):
    whole, half = (paths["out"] / name for name in ("whole.pt", "half.pt"))
    command = [*TRAIN.format(**paths).split(), "--steps", 4, "--ticket", "base", "--freeze", 0.2, "--out"]
    assert call(*command, whole) == 0
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*command, half)
    unfinished = torch.load(half, weights_only=True)
    assert unfinished["step"] == 1 and weights.load(half).info["ticket"]["kind"] == "base"
    assert call(*command, half, "--resume") == 0
    assert read(whole)["ticket"]["masks"].equal(read(half)["ticket"]["masks"])


def agreement(a, b):
    """Returns the share of the bits that are the same in the masks of two files."""
    bits = [np.unpackbits(read(path)["ticket"]["masks"].numpy()) for path in (a, b)]
    return (bits[0] == bits[1]).mean()


def test_a_ticket_does_not_resume_over_other_weights(paths, tmp_path, monkeypatch, capfd):
    old = tmp_path / "old.pt"
    old.write_bytes(paths["old"].read_bytes())
    command = [*TRAIN.format(**paths | dict(old=old)).split(), "--ticket", "base"]
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*command)
    old.write_bytes(paths["new"].read_bytes())
    capfd.readouterr()
    one_line(call(*command, "--resume"), capfd.readouterr().err, "--resume", "x.pt", "other weights")


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
    eager, compiled = (paths["out"] / name for name in ("eager.pt", "compiled.pt"))
    for path, flags in ((eager, []), (compiled, ["--compile"])):
        assert call(*TRAIN.format(**paths).split(), "--ticket", "base", *flags, "--out", path) == 0
    assert agreement(eager, compiled) > 0.999


def test_under_bfloat16_autocast_the_scores_stay_float32_and_get_gradients():
    policy = classifier()
    tickets.convert(policy, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    logits.square().sum().backward()
    scores = policy.visual.parametrizations.proj.original
    assert scores.dtype == scores.grad.dtype == torch.float32 and scores.grad.abs().sum() > 0


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
        copied, new = tmp_path / f"{script}-copied.pt", tmp_path / f"{script}-new.pt"
        for path, init in ((copied, []), (new, ["--reward-init", "random"])):
            assert call(f"{script}.py", *flags, *init, "--seed", 7, "--lr", "1e-9", "--out", path) == 0
        a, b = (dict(weights.load(path, "prt").named_parameters()) for path in (copied, new))
        matrices = [name for name, p in a.items() if p.ndim > 1]
        assert all((a[name] - b[name]).abs().max() > 0.01 for name in matrices)


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
