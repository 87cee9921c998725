"""train_vision.py: the run without arguments, two processes, resumed runs, and bad input."""
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN, assert_refused, call, contents, interrupted, one_line, read, same, two_processes

import prt
from data import files
from models import weights
from models.clip import CLIP
from train_vision import SIZES

OLD, CONVNEXT = "out/shapes-0/old.pt", "convnext.pt"
TUNE = ("--source", OLD, "--batch", "16", "--steps", "4", "--lr", "1e-3", "--device", "cpu")
PRETRAIN = ("--method", "pretrain", "--size", "tiny", *TUNE[2:])


def test_without_arguments_it_makes_five_models_and_prints_how_to_use_them(shapes):
    assert shapes.printed.splitlines()[-1] == "python eval.py --run out/shapes-0"
    models = {path.stem: read(path) for path in shapes.written}
    assert {name: model.get("method") for name, model in models.items()} == dict(
        old=None, new=None, reward="prt", tuned="ft", oracle="ft")
    assert all(model["step"] == 3 and "optimizer" not in model for model in models.values())
    keys = {"kind", "arch", "classes", "templates", "data", "beta", "method", "source", "args"}
    assert keys <= models["reward"].keys()
    assert not any(name.startswith("transformer.") for name in models["reward"]["model"])  # no text tower


# A convolutional tower

@pytest.fixture(scope="module")
def convnext(shapes):
    """Writes a CLIP with a ConvNeXt and random weights into the folder of `shapes`; returns its path."""
    torch.manual_seed(0)
    arch = {k: v for k, v in SIZES["tiny"].items() if k not in ("width", "patch", "heads")}
    clip = CLIP(arch | dict(widths=[8, 12, 16, 24], layers=[1, 1, 2, 1], mlp_head=True))
    with torch.no_grad():  # the initial layer scale hides what a block does
        for stage in clip.visual.trunk.stages:
            for block in stage.blocks:
                block.gamma.fill_(0.5)
    files.save(shapes.folder / CONVNEXT, dict(kind="clip", arch=clip.arch, model=clip.state_dict()))
    return shapes.folder / CONVNEXT


@pytest.mark.parametrize("method", ["prt", "ft"])
def test_a_convnext_is_tuned_and_loaded_again(convnext, in_shapes, tmp_path, monkeypatch, method):
    """Catches: A part of the tower is not tuned or not saved, or read back as another."""
    fit, policies, out = prt.fit, [], tmp_path / "tuned.pt"

    def watched(policy, *args, **options):
        policies.append(policy)
        fit(policy, *args, **options)

    monkeypatch.setattr(prt, "fit", watched)
    assert call("train_vision.py", *TUNE, "--source", CONVNEXT, "--method", method, "--out", out) == 0
    before, after, tuned = read(convnext)["model"], read(out)["model"], weights.load(out, method, text=False)
    visual = {name for name in before if name.startswith("visual.")}
    assert set(after) == {"head", *visual}
    assert all(not torch.allclose(after[name], before[name], atol=1e-4) for name in visual)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(tuned(images), policies[0](images))


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
        plain=TUNE, augment=(*TUNE, "--augment"), convnext=(*TUNE, "--base", CONVNEXT), pretrain=PRETRAIN,
        resumed=(*TUNE, "--resume"), stopped=TUNE).items()]
    printed = two_processes("train_vision", commands, 2, folder, cwd=shapes.folder, cache=shapes.cache)
    return SimpleNamespace(folder=folder, printed=printed)


@pytest.mark.parametrize("name, options, base", [
    ("plain", (), OLD), ("augment", ("--augment",), OLD), ("convnext", ("--base", CONVNEXT), CONVNEXT)])
def test_two_processes_equal_one(twice, in_shapes, tmp_path, capsys, name, options, base):
    """Catches: The gradients are averaged over processes instead of targets, or ranks see the same images.

    Two processes that write the same file would show too.
    """
    one, two = tmp_path / "one.pt", twice.folder / f"{name}.pt"
    assert call("train_vision.py", *TUNE, *options, "--accum", 2, "--out", one) == 0
    assert same(one, two, atol=1e-6)
    weight = "visual.trunk.stem.0.weight" if base == CONVNEXT else "visual.proj"
    assert not torch.allclose(read(one)["model"][weight], read(base)["model"][weight], atol=1e-4)
    alone, = re.findall(r"one 4/4: (loss .* norm [\d.]+)", capsys.readouterr().out)
    together, = re.findall(rf"{name} 4/4: (loss .* norm [\d.]+)", twice.printed)
    assert alone == together


def test_two_processes_pretrain_the_clip_of_one_process(twice, in_shapes, tmp_path):
    """Catches: Pretraining with sharded weights hangs, or saves a part of the weights."""
    one, two = tmp_path / "one.pt", twice.folder / "pretrain.pt"
    assert call("train_vision.py", *PRETRAIN, "--accum", 2, "--out", one) == 0
    a, b = read(one)["model"], read(two)["model"]
    for name, x in a.items():
        # A key's bias has no gradient but the rounding errors, which Adam magnifies.
        assert torch.allclose(x, b[name], atol=1e-4 if name.endswith("in_proj_bias") else 1e-6), name
    torch.manual_seed(0)
    start, clip = CLIP(SIZES["tiny"]), weights.load(two, "base", text=False)
    assert all(not torch.allclose(x, y, atol=1e-4) for x, y in zip(clip.parameters(), start.parameters()))


def test_two_processes_resume_a_run_of_one(twice):
    """Catches: The optimizer's state of one process does not reach the shards of two."""
    assert re.findall(r"^resumed (\d)/4", twice.printed, re.M) == ["2", "3", "4"]
    assert same(twice.folder / "plain.pt", twice.folder / "resumed.pt", atol=1e-6)


def test_one_process_resumes_a_run_of_two(twice, in_shapes, tmp_path, capsys):
    """Catches: One process cannot continue an unfinished run of two, or starts it anew."""
    stopped = tmp_path / "stopped.pt"
    stopped.write_bytes((twice.folder / "stopped.pt").read_bytes())
    assert read(stopped)["step"] == 2
    assert call("train_vision.py", *TUNE, "--accum", 2, "--out", stopped, "--resume") == 0
    assert re.findall(r"^stopped (\d)/4", capsys.readouterr().out, re.M) == ["3", "4"]
    assert same(twice.folder / "plain.pt", stopped, atol=1e-6)


# Flags and resumed runs

@pytest.mark.parametrize("flags", ["--seed 1", "--augment", "--alpha 0.5", "--weight-decay 0.5", "--warmup 1",
                                   "--lr 1e-3", "--method ft"])
def test_a_flag_changes_the_trained_weights(paths, flags):
    assert call(*TRAIN.format(**paths).split(), *flags.split()) == 0
    assert not same(paths["out"] / "x.pt", paths["reward"])


def test_the_seed_changes_the_weights_that_pretraining_starts_from(paths):
    assert not same(paths["old"], paths["new"], atol=1e-2)


@pytest.mark.parametrize("options, other", [
    (("--augment",), ("--seed", "1")), (("--method", "pretrain", "--size", "tiny"), ("--accum", "2"))])
def test_an_interrupted_command_resumes_bit_for_bit(paths, monkeypatch, capfd, options, other):
    """Catches: A batch or a random view is repeated, or the optimizer's state is forgotten.

    --accum counts in pretraining, which contrasts the examples of a micro-batch.
    """
    command = (*TRAIN.format(**paths).split(), *options, "--steps", 7, "--warmup", 2, "--lr", 1e-3, "--out")
    whole, half = paths["out"] / "whole.pt", paths["out"] / "half.pt"
    assert call(*command, whole) == 0
    interrupted(*command, half)
    assert read(half)["step"] == 1 and not same(whole, half, atol=1e-4)
    capfd.readouterr()
    one_line(call(*command, half, "--resume", *other), capfd.readouterr().err, half, *other)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    assert call(*command, half, "--resume", "--compile", "--device", "cpu") == 0
    assert same(whole, half) and read(half)["step"] == 7 and "optimizer" not in read(half)


# Bad input

CASES = {
    "unknown data": (TRAIN + "--data shapez", "--data shapez", "cifar100"),
    "no such base": (TRAIN + "--base {none}/base.pt", "{none}/base.pt"),
    "reward as base": (TRAIN + "--base {reward}", "{reward} is a reward"),
    "out exists": (TRAIN + "--out {reward}", "{reward} exists", "--resume"),
    "out is a folder": (TRAIN + "--out {data}", "{data}"),
    "resume without file": (TRAIN + "--resume", "--resume", "{out}/x.pt"),
    "resume of a finished run": (TRAIN + "--resume --out {reward}", "--resume", "{reward}", "step: 2"),
    "resume with another base": (TRAIN + "--resume --out {half} --base {new}", "{half}", "--base"),
    "resume of another program's file": (TRAIN + "--resume --out {foreign}", "--resume", "{foreign}"),
    "default run over another program's file": ("train_vision.py --out {demo}", "{demo}/old.pt", "--out"),
    "nothing held out": (TRAIN + "--hold-out 0.02", "--hold-out 0.02 of 9"),
    "no such device": (TRAIN + "--device gpu", "--device gpu"),
    "uneven batch": (TRAIN + "--accum 3", "8", "3"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_and_touches_no_file(paths, capfd, case):
    """Catches: A traceback, an error that does not name the file or flag, or files written before it."""
    assert_refused(CASES[case], paths, capfd, paths["out"], paths["root"])


def test_the_refused_command_line_runs_without_its_fault(paths, capfd):
    """Catches: The command lines above fail for another reason than their own."""
    out = paths["out"] / "a/new/folder/x.pt"
    assert call(*TRAIN.format(**paths).split(), "--out", out) == 0
    assert [*contents(paths["out"])] == [out]
    assert capfd.readouterr().err == ""
