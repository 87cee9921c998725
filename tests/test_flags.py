"""models/flags.py: --help, mistyped flags, and which value wins."""
import argparse
import copy
import re

import pytest
import torch
from conftest import SCRIPTS, call, one_line, spawn

import train_lm
import train_vision

SLOW = {"torch", "numpy", "PIL", "tqdm", "tiktoken"}
TRAINING = {"train_vision.py": train_vision, "train_lm.py": train_lm}
# The flags that have no default: a run or a table does without them.
NO_DEFAULT = {
    "train_vision.py": {"resume", "augment", "compile"},
    "train_lm.py": {"resume", "drop", "recompute", "compile"},
    "eval.py": {"run", "reward", "base", "tuned", "oracle", "tasks", "apply_chat_template", "limit", "json",
                "picture", "prompt", "speculative", "compile"}}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture
def parser(script, monkeypatch):
    """The parser of a script."""
    class Parsed(Exception):
        pass

    def keep(parser):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(Parsed) as parsed:
        SCRIPTS[script].parse()
    return parsed.value.args[0]


def helps(parser):
    """Returns flag -> help on one line, with what argparse fills in."""
    return {action.dest: action.help % dict(prog="") for action in parser._actions if action.dest != "help"}


def run(*command, cwd):
    """Runs a script as a process; returns its exit code, stdout, stderr, and the packages that it imports."""
    done = spawn("-X", "importtime", *command, cwd=cwd)
    lines = done.stderr.splitlines(True)
    imports = [line for line in lines if line.startswith("import time:")]
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    return done.returncode, done.stdout, "".join(line for line in lines if line not in imports), packages


# --help

def test_help_imports_nothing_slow(script, tmp_path):
    """Catches: It takes seconds."""
    code, printed, err, packages = run(script, "--help", cwd=tmp_path)
    assert code == 0 and err == "" and "argparse" in packages and not packages & SLOW
    assert printed.startswith(f"usage: {script}") and SCRIPTS[script].__doc__.strip() in printed


def test_help_has_the_flags_in_groups(parser):
    _, others, *groups = parser._action_groups
    assert [action.dest for action in others._group_actions] == ["help"]
    assert all(f"\n{group.title}:\n" in parser.format_help() for group in groups)


def test_help_shows_a_default_for_every_flag_that_has_one(script, parser):
    lines = helps(parser)
    assert {flag for flag, line in lines.items() if "(default: " not in line} == NO_DEFAULT[script]
    for flag in lines.keys() - NO_DEFAULT[script]:
        value = parser.get_default(flag)
        if value is not None:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            assert re.search(rf"\(default: {text}[,;)]", lines[flag])


@pytest.mark.parametrize("script", TRAINING, indirect=True)
def test_help_shows_the_default_of_each_recipe_where_they_differ(script, parser):
    tune, pretrain, lines = TRAINING[script].PAPER, TRAINING[script].SCRATCH, helps(parser)
    for flag in {*tune, *pretrain} - {"method", "size", "epochs"}:
        shown = re.search(r"\(default: ([^;)]*)(?:; pretrain: ([^)]*))?\)", lines[flag])
        values = [str(recipe.get(flag, "none")) for recipe in (tune, pretrain)]
        assert [shown[1], shown[2] or shown[1]] == values
    assert "(default: prt)" in lines["method"] and f"(default: {pretrain['size']})" in lines["size"]
    if "epochs" in tune:
        assert f"(default: {tune['epochs']})" in lines["epochs"]
    if "chunk" in lines:
        assert f"(default: {train_lm.chunk_size(512, torch.device('cpu'))} on a CPU)" in lines["chunk"]


@pytest.mark.parametrize("script", TRAINING, indirect=True)
def test_help_shows_the_recipes_of_the_run_without_arguments(script, parser):
    _, _, epilog = parser.format_help().partition("these models:\n")
    lines = dict(line.split(maxsplit=1) for line in epilog.splitlines())
    assert lines.keys() == TRAINING[script].STAGES.keys()
    for name, recipe in TRAINING[script].STAGES.items():
        shown = dict(word.split() for word in lines[name].removeprefix("--").split(" --"))
        assert shown == {flag.replace("_", "-"): str(value) for flag, value in recipe.items()}


# Mistyped flags

@pytest.mark.parametrize("script, flag, value", [
    ("train_vision.py", "--sped", "3"), ("train_lm.py", "--lr", "0"), ("eval.py", "--batch", "x")])
def test_a_mistyped_flag_is_refused_before_anything_slow_is_imported(script, flag, value, tmp_path):
    code, _, err, packages = run(script, flag, value, cwd=tmp_path)
    one_line(code, err, flag, value)
    assert not packages & SLOW


NUMBERS = "0 -1 nan inf -inf x"
REFUSED = {
    "train_vision.py": {
        "--method": "sft", "--size": "huge", "--ticket": "golden", "--reward-init": "path.pt",
        "--steps": "0 -1 1.5 x", "--batch": "0 -8 1.5", "--accum": "0 -1", "--seed": "x", "--warmup": "1.5",
        "--lr": NUMBERS, "--beta": NUMBERS, "--alpha": "x", "--weight-decay": "x",
        "--hold-out": "0 1 1.5 nan", "--keep": "0 1", "--freeze": "1"},
    "train_lm.py": {"--size": "huge", "--length": "0 1.5", "--epochs": "0 nan", "--chunk": "0"},
    "eval.py": {"--beta": "0 nan x", "--batch": "0", "--limit": "0", "--new-tokens": "0", "--top-p": "0"}}


@pytest.mark.parametrize("script, flag, value", [
    (script, flag, value) for script, flags in REFUSED.items() for flag, values in flags.items()
    for value in values.split()])
def test_an_impossible_value_is_refused_in_one_line(script, flag, value, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    one_line(call(script, f"{flag}={value}"), capfd.readouterr().err, flag, value)
    assert not list(tmp_path.iterdir())


# Which value wins

@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The arguments of each run of train_lm.py, which trains nothing and writes to an empty folder."""
    trained = []
    monkeypatch.setattr(train_lm, "train", lambda args, device, state: trained.append(args))
    monkeypatch.chdir(tmp_path)
    return trained


@pytest.mark.parametrize("options, values", [
    ("--batch 8 --beta 0.5", dict(batch=8, lr=2e-5, beta=0.5)),
    ("", dict(method="prt", batch=128, accum=16, lr=2e-5, epochs=2, steps=None, length=1024, warmup=None,
              weight_decay=0.0, beta=1.0, base="Qwen/Qwen2.5-0.5B", out="out/gsm8k-prt.pt")),
    ("--method ft --base x.pt", dict(lr=2e-5, base="x.pt", out="out/gsm8k-ft.pt")),
    ("--data some/where --base x.pt", dict(method="prt", out="out/where-prt.pt")),
    ("--warmup 0 --out y.pt", dict(warmup=0, out="y.pt")),
    ("--method pretrain --lr 1 --size old", dict(size="old", lr=1.0, weight_decay=0.1)),
    ("--method pretrain --weight-decay 0", dict(size="new", batch=64, steps=1000, epochs=None, length=65,
                                                base=None, weight_decay=0.0, out="out/gsm8k-pretrain.pt")),
    ("--method pretrain --epochs 3", dict(epochs=3.0, steps=None)),
    ("--method pretrain --epochs 3 --steps 7", dict(epochs=3.0, steps=7)),
    ("--ticket random", dict(lr=0.01, keep=0.5, freeze=0.0, batch=128)),
    ("--ticket base --lr 1 --keep 0.1", dict(lr=1.0, keep=0.1))])
def test_a_run_has_the_values_of_its_flags_and_its_recipe(trained, options, values):
    """Catches: A recipe wins over a flag, a flag of 0 is not seen, or a run changes the recipe."""
    assert call("train_lm.py", "--data", "gsm8k", *options.split()) == 0
    args, = map(vars, trained)
    assert {flag: args[flag] for flag in values} == values


def test_flags_count_for_every_stage_but_for_what_the_stages_fix(trained):
    stages = copy.deepcopy(train_lm.STAGES)
    options = "--out folder --size large --lr 0.5 --reward-init random --seed 5"
    assert call("train_lm.py", *options.split()) == 0
    assert [args.size for args in trained] == ["old", "new", "large", "large", "large"]
    assert [args.reward_init for args in trained] == [None, None, "random", None, None]
    assert {(args.lr, args.seed, args.resume) for args in trained} == {(0.5, 5, False)}
    assert [args.steps for args in trained] == [500, 1000, 900, 900, 300]
    assert [args.data for args in trained] == ["arithmetic-old", "arithmetic-new", *["arithmetic"] * 3]
    assert [args.out for args in trained] == [
        f"folder/{name}.pt" for name in ("old", "new", "reward", "tuned", "oracle")]
    assert [args.base for args in trained] == [
        None, None, "folder/old.pt", "folder/old.pt", "folder/new.pt"]
    assert stages == train_lm.STAGES
