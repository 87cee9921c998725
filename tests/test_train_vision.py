"""train_vision.py: a convolutional tower, two processes, and flags."""
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import TRAIN, call, interrupted, one_line, processes, read, same

import prt
import train_vision
from data import files
from models import weights
from models.clip import CLIP, classifier
from models.pretrain import CLIPS

OLD, CONVNEXT = "out/shapes-0/old.pt", "convnext.pt"
TUNE = ("--source", OLD, "--batch", "16", "--steps", "4", "--lr", "1e-3", "--device", "cpu")
PRETRAIN = ("--method", "pretrain", "--size", "tiny", *TUNE[2:])


# A convolutional tower

@pytest.fixture(scope="module")
def convnext(shapes):
    """Writes a CLIP with a ConvNeXt and random weights into the folder of `shapes`; returns its path."""
    torch.manual_seed(0)
    arch = {k: v for k, v in CLIPS["tiny"].items() if k not in ("width", "patch", "heads")}
    clip = CLIP(arch | dict(widths=[8, 12, 16, 24], layers=[1, 1, 2, 1], mlp_head=True))
    for name, p in clip.named_parameters():
        if name.endswith("gamma"):
            p.data.fill_(0.5)  # the initial layer scale hides what a block does
    files.save(shapes.folder / CONVNEXT, dict(kind="clip", arch=clip.arch, model=clip.state_dict()))
    return shapes.folder / CONVNEXT


@pytest.mark.parametrize("method, more", [("prt", ()), ("ft", ()), ("prt", ["--augment"])])
def test_a_convnext_is_tuned_and_loaded_again(convnext, in_shapes, tmp_path, monkeypatch, method, more):
    """Catches: Statistics or weights are lost; with --augment, the reward is trained on no base at all."""
    out = tmp_path / "tuned.pt"
    monkeypatch.setattr(prt, "fit", mock.Mock(wraps=prt.fit))
    assert call("train_vision.py", *TUNE, "--source", CONVNEXT, "--method", method, *more, "--out", out) == 0
    before, after, tuned = read(convnext)["model"], read(out)["model"], weights.load(out, method, text=False)
    visual = {name for name in before if name.startswith("visual.")}
    assert set(after) == {"head", *visual}
    assert all(not torch.allclose(after[name], before[name], atol=1e-4) for name in visual)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(tuned(images), prt.fit.call_args.args[0](images))
        if base := prt.fit.call_args.kwargs["base"]:
            clip, data = weights.load(convnext), train_vision.images.load("shapes", "test", 32)
            source = classifier(clip, train_vision.images.prompts(data.classes, data.templates))
            assert torch.allclose(base(images), source(images), atol=1e-5)
    assert (base is None) == (not more)


# Two processes

@pytest.fixture(scope="module")
def twice(shapes, convnext, tmp_path_factory):
    """Runs by two processes, the last of which stops after its second step: folder, and what they print."""
    folder = tmp_path_factory.mktemp("twice")
    with pytest.MonkeyPatch.context() as patch:  # what one process begins, two will resume
        patch.chdir(shapes.folder)
        patch.setattr(files, "CACHE", shapes.cache)
        interrupted("train_vision.py", *TUNE, "--accum", 2, "--out", folder / "resumed.pt")
    commands = [(*command, "--out", str(folder / f"{name}.pt")) for name, command in dict(
        plain=TUNE, augment=(*TUNE, "--augment"), convnext=(*TUNE, "--source", CONVNEXT), pretrain=PRETRAIN,
        resumed=(*TUNE, "--resume"), stopped=TUNE).items()]
    printed = processes(2, "train_vision", commands, 2, folder, cwd=shapes.folder, cache=shapes.cache)
    return SimpleNamespace(folder=folder, printed=printed)


@pytest.mark.parametrize("name, options, base", [
    ("plain", (), OLD), ("augment", ("--augment",), OLD), ("convnext", ("--source", CONVNEXT), CONVNEXT)])
def test_two_processes_equal_one(twice, in_shapes, tmp_path, capsys, name, options, base):
    """Catches: The gradients are averaged over processes instead of targets, or ranks see the same images."""
    one, two = tmp_path / "one.pt", twice.folder / f"{name}.pt"
    assert call("train_vision.py", *TUNE, *options, "--accum", 2, "--out", one) == 0
    assert same(one, two, atol=1e-6)
    weight = "visual.trunk.stem.0.weight" if base == CONVNEXT else "visual.proj"
    assert not torch.allclose(read(one)["model"][weight], read(base)["model"][weight], atol=1e-4)
    alone, = re.findall(r"one 4/4: (loss .* norm [\d.]+)", capsys.readouterr().out)
    together, = re.findall(rf"{name} 4/4: (loss .* norm [\d.]+)", twice.printed)
    assert alone == together


def assert_close(a, b):
    a, b = read(a)["model"], read(b)["model"]
    for name, x in a.items():
        # A key's bias has no gradient but the rounding errors, which Adam magnifies.
        assert torch.allclose(x, b[name], atol=1e-4 if name.endswith("in_proj.bias") else 1e-6), name


def test_two_processes_pretrain_the_clip_of_one_process(twice, in_shapes, tmp_path):
    one, two = tmp_path / "one.pt", twice.folder / "pretrain.pt"
    assert call("train_vision.py", *PRETRAIN, "--accum", 2, "--out", one) == 0
    assert_close(one, two)
    torch.manual_seed(0)
    start, clip = CLIP(CLIPS["tiny"]), weights.load(two, "base", text=False)
    assert all(not torch.allclose(x, y, atol=1e-4) for x, y in zip(clip.parameters(), start.parameters()))


def test_a_run_goes_on_with_another_number_of_processes(twice, in_shapes, capsys):
    """Catches: The optimizer's state does not reach the shards of two processes, or one starts anew."""
    assert re.findall(r"^resumed (\d)/4", twice.printed, re.M) == ["2", "3", "4"]
    stopped = twice.folder / "stopped.pt"
    assert read(stopped)["step"] == 2
    assert call("train_vision.py", *TUNE, "--accum", 2, "--out", stopped, "--resume") == 0
    assert re.findall(r"^stopped (\d)/4", capsys.readouterr().out, re.M) == ["3", "4"]
    for name in ("resumed", "stopped"):
        assert same(twice.folder / "plain.pt", twice.folder / f"{name}.pt", atol=1e-6)


def test_four_processes_train_and_score_as_one_and_two_resume_their_run(in_shapes, tmp_path, capsys):
    """Catches: Processes gather the weights of two models in different orders, or score other images."""
    command = (*TUNE, "--augment", "--out")
    one, four, half = (str(tmp_path / f"{name}.pt") for name in ("one", "four", "half"))
    where = dict(folder=tmp_path, cwd=in_shapes.folder, cache=in_shapes.cache)
    printed = processes(4, "train_vision", [(*command, four), (*command, half)], 3, **where)
    assert read(half)["step"] == 3
    printed += processes(2, "train_vision", [(*command, half, "--resume", "--accum", "2"),
                                             (*command, str(tmp_path / "x.pt"))], 0, **where)
    assert call("train_vision.py", *command, one, "--accum", 4) == 0
    assert_close(one, four)
    assert_close(one, half)
    scored = dict(re.findall(r"^(\S+): ([\d.]+%) on", printed + capsys.readouterr().out, re.M))
    assert scored[one] == scored[four] == scored[half]


@pytest.mark.parametrize("flags", ["--seed 1", "--augment", "--alpha 0.5", "--weight-decay 0.5", "--warmup 1",
                                   "--lr 1e-3", "--method ft"])
def test_a_flag_changes_the_trained_weights(paths, flags):
    assert call(*TRAIN.format(**paths).split(), *flags.split()) == 0
    assert not same(paths["out"] / "x.pt", paths["reward"])
    assert not same(paths["old"], paths["new"], atol=1e-2)  # pretrained with different seeds


def test_a_reward_goes_on_from_another_in_a_folder(paths, tmp_path, capfd):
    """Catches: It starts from the source again, or from a reward for other classes; a folder is refused."""
    flags = *TRAIN.format(**paths).split(), "--steps", 1, "--lr", 1e-12, "--device", "cpu"
    for out in tmp_path / "new", tmp_path / "new":  # made in the first run, there in the second
        out.mkdir(exist_ok=True)
        assert call(*flags, "--reward-init", paths["reward"], "--out", f"{out}/") == 0
        assert same(paths["reward"], out / "data-prt.pt", atol=1e-6)
        (out / "data-prt.pt").unlink()
    capfd.readouterr()
    code = call(*flags, "--data", paths["other"], "--reward-init", paths["reward"])
    one_line(code, capfd.readouterr().err, f"--reward-init {paths['reward']}", "classes are others")


def test_pretraining_goes_on_from_a_source(paths, tmp_path):
    """Catches: --source is ignored, the architecture is that of --size, or --resume starts at the source."""
    command = [*TRAIN.format(**paths).split(), "--method", "pretrain", "--out"]
    still, whole, half = (tmp_path / f"{name}.pt" for name in ("still", "whole", "half"))
    assert call(*command, still, "--lr", 1e-9) == 0 and call(*command, whole) == 0
    assert same(still, paths["old"], atol=1e-7) and not same(whole, paths["old"], atol=1e-4)
    assert read(still)["arch"] == read(paths["old"])["arch"] != CLIPS["small"]
    interrupted(*command, half)
    assert call(*command, half, "--resume") == 0 and same(whole, half)
