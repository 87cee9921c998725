"""train_vision.py: the run without arguments, two processes, resumed runs, and bad input."""
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    TRAIN,
    assert_refused,
    call,
    contents,
    interrupt,
    one_line,
    output,
    read,
    same,
    two_processes,
)

import prt
from data import files
from models import weights
from models.clip import CLIP
from train_vision import SIZES

STAGES = "old", "new", "reward", "tuned", "oracle"
OLD = "out/shapes-0/old.pt"
TUNE = ("--base", OLD, "--batch", "16", "--steps", "4", "--lr", "1e-3", "--device", "cpu")
PRETRAIN = ("--method", "pretrain", "--size", "tiny", *TUNE[2:])


# The run without arguments

def test_without_arguments_it_makes_five_models_and_prints_how_to_use_them(shapes):
    assert shapes.printed.splitlines()[-1] == "python eval.py --run out/shapes-0"
    paths = [shapes.folder / f"out/shapes-0/{name}.pt" for name in STAGES]
    assert shapes.written == sorted(paths)
    assert [read(path).get("method") for path in paths] == [None, None, "prt", "ft", "ft"]
    assert all(read(path)["step"] == 3 and "optimizer" not in read(path) for path in paths)


def test_a_reward_holds_what_eval_needs_and_no_text_tower(shapes):
    reward = read(shapes.folder / "out/shapes-0/reward.pt")
    assert not any(name.startswith("transformer.") for name in reward["model"]) and "optimizer" not in reward
    assert {"kind", "arch", "classes", "templates", "beta", "method", "source", "args", "step"} <= set(reward)


def test_a_second_run_without_arguments_keeps_the_models_that_are_there(in_shapes, capsys):
    before = contents(in_shapes.folder)
    assert call("train_vision.py", "--steps", 3, "--batch", 8) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+) is finished", printed, re.M) == [f"out/shapes-0/{name}.pt" for name in STAGES]
    assert "loss" not in printed
    assert contents(in_shapes.folder) == before


# A convolutional tower

CONVNEXT = "convnext.pt"


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
    assert call("train_vision.py", *TUNE, "--base", CONVNEXT, "--method", method, "--out", out) == 0
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
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call("train_vision.py", *TUNE, "--accum", 2, "--out", folder / "resumed.pt")
    commands = [(*command, "--out", str(folder / f"{name}.pt")) for name, command in dict(
        plain=TUNE, augment=(*TUNE, "--augment"), convnext=(*TUNE, "--base", CONVNEXT), pretrain=PRETRAIN,
        resumed=(*TUNE, "--resume"), stopped=TUNE).items()]
    printed = two_processes("train_vision", commands, 2, folder, cwd=shapes.folder, cache=shapes.cache)
    return SimpleNamespace(folder=folder, printed=printed)


@pytest.mark.parametrize("name, options, weight", [
    ("plain", (), "visual.proj"), ("augment", ("--augment",), "visual.proj"),
    ("convnext", ("--base", CONVNEXT), "visual.trunk.stem.0.weight")])
def test_two_processes_equal_one(twice, in_shapes, tmp_path, capsys, name, options, weight):
    """Catches: The gradients are averaged over processes instead of targets, or ranks see the same images.

    Two processes that write the same file would show too.
    """
    one, two = tmp_path / "one.pt", twice.folder / f"{name}.pt"
    assert call("train_vision.py", *TUNE, *options, "--accum", 2, "--out", one) == 0
    assert same(one, two, atol=1e-6)
    base = CONVNEXT if name == "convnext" else OLD
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


# Resumed runs

def test_an_interrupted_command_resumes_bit_for_bit(in_shapes, tmp_path, monkeypatch, capfd):
    """Catches: --resume leaves other weights than the run that was never stopped."""
    command = ("train_vision.py", "--base", OLD, "--batch", 8, "--steps", 12, "--warmup", 2, "--out")
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    assert call(*command, whole) == 0
    save = files.save

    def save_and_fail(path, checkpoint, **options):
        save(path, checkpoint)
        raise OSError(f"interrupted at step {checkpoint['step']}")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save", save_and_fail)
        one_line(call(*command, half), capfd.readouterr().err, "interrupted at step 3")
    output(*command, half, "--resume", cwd=in_shapes.folder, cache=in_shapes.cache)
    assert same(whole, half)


def test_a_resumed_run_ends_where_an_uninterrupted_run_ends(paths):
    """Catches: The refusal is too strict, a batch is repeated, or the optimizer's state is forgotten."""
    half = paths["out"] / "half.pt"
    half.write_bytes(paths["half"].read_bytes())
    assert call(*TRAIN.format(**paths).split(), "--resume", "--out", half) == 0
    resumed, whole = files.read(half), files.read(paths["reward"])
    assert resumed["step"] == whole["step"] == 2 and "optimizer" not in resumed
    assert same(half, paths["reward"])


# Bad input

CASES = {
    "unknown data": (TRAIN + "--data shapez", "--data shapez", "cifar100"),
    "no such folder": (TRAIN + "--data {none}", "{none}"),
    "no such base": (TRAIN + "--base {none}/base.pt", "{none}/base.pt"),
    "base out of reach": (TRAIN + "--base org/name",
                          "https://huggingface.co/org/name/resolve/main/open_clip_config.json",
                          "cache/hub/org/name/open_clip_config.json"),
    "reward as base": (TRAIN + "--base {reward}", "{reward} is a reward"),
    "tuned as base": (TRAIN + "--base {ft}", "{ft} is a fine-tuned"),
    "data set as base": (TRAIN + "--base {data}", "{data}"),
    "image as base": (TRAIN + "--base {image}", "{image}"),
    "out exists": (TRAIN + "--out {reward}", "{reward} exists", "--resume"),
    "unfinished out exists": (TRAIN + "--out {half}", "{half} exists", "--resume"),
    "out is a folder": (TRAIN + "--out {data}", "{data}"),
    "resume without file": (TRAIN + "--resume", "--resume", "{out}/x.pt"),
    "resume of a finished run": (TRAIN + "--resume --out {reward}", "--resume", "{reward}", "step: 2"),
    "resume with another lr": (TRAIN + "--resume --out {half} --lr 1", "--resume", "{half}", "--lr"),
    "resume with another base": (TRAIN + "--resume --out {half} --base {new}", "{half}", "--base"),
    "resume with other steps": (TRAIN + "--resume --out {half} --steps 3", "--resume", "{half}", "--steps"),
    "resume of another program's file": (TRAIN + "--resume --out {foreign}", "--resume", "{foreign}"),
    "default run over another program's file": ("train_vision.py --out {demo}", "{demo}/old.pt", "--out"),
    "resume of a damaged file": (TRAIN + "--resume --out {damaged}", "{damaged}"),
    "no such device": (TRAIN + "--device gpu", "--device gpu"),
    "uneven batch": (TRAIN + "--accum 3", "8", "3"),
    "no batch": (TRAIN + "--batch 0", "--batch"),
    "negative batch": (TRAIN + "--batch -8", "--batch"),
    "no steps": (TRAIN + "--steps 0", "--steps"),
    "no micro-batches": (TRAIN + "--accum 0", "--accum"),
    "zero beta": (TRAIN + "--beta 0", "--beta"),
    "negative beta": (TRAIN + "--beta -1", "--beta"),
    "beta is no number": (TRAIN + "--beta nan", "--beta"),
    "negative lr": (TRAIN + "--lr -1", "--lr"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_and_touches_no_file(paths, capfd, case):
    """Catches: A traceback, an error that does not name the file or flag, or files written before it."""
    assert_refused(CASES[case], paths, capfd, paths["out"], paths["root"])


def test_the_refused_command_line_runs_without_its_fault(paths, capfd):
    """Catches: The command lines above fail for another reason than their own."""
    assert call(*TRAIN.format(**paths).split()) == 0
    assert [*contents(paths["out"])] == [paths["out"] / "x.pt"]
    assert capfd.readouterr().err == ""
