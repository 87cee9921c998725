"""models/flags.py: --help, defaults, which value wins, and mistyped flags."""
import argparse
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, call, one_line

import train_lm
import train_vision
from models import flags, runs

SLOW = {"torch", "numpy", "PIL", "tqdm", "tiktoken"}
TRAINING = {"train_vision.py": train_vision, "train_lm.py": train_lm}
# The flags that have no default: a run or a table does without them.
NO_DEFAULT = {
    "train_vision.py": {"resume", "augment", "compile"},
    "train_lm.py": {"resume", "drop", "recompute", "compile"},
    "eval.py": {"run", "reward", "base", "tuned", "oracle", "tasks", "apply_chat_template", "limit", "json",
                "picture", "prompt", "speculative", "compile"}}
TICKET = {"a reward in a small file": "ticket keep freeze"}
GROUPS = {
    "train_vision.py": dict(run="base method out resume seed data size reward_init",
                            recipe="steps batch accum lr warmup weight_decay beta alpha hold_out augment",
                            **TICKET, machine="device compile"),
    "train_lm.py": dict(run="base method out resume seed data reward_init size",
                        recipe="steps batch accum lr warmup weight_decay beta alpha hold_out epochs length "
                               "drop",
                        **TICKET, machine="device compile recompute chunk"),
    "eval.py": {"models": "run reward base ref tuned oracle beta",
                "table": "data tasks apply_chat_template limit batch json picture device",
                "answers to text": "prompt new_tokens temperature top_p seed speculative compile"}}


def run(script, *argv):
    """Runs a script as a process; returns its exit code, stdout, stderr, and the packages that it imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / script, *argv], capture_output=True,
                          text=True)
    imports = [line for line in done.stderr.splitlines(True) if line.startswith("import time:")]
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    err = "".join(line for line in done.stderr.splitlines(True) if line not in imports)
    return done.returncode, done.stdout, err, packages


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


# --help

def test_help_answers_within_a_second(script):
    def seconds():
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / script, "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1


def test_help_imports_nothing_slow(script):
    code, printed, err, packages = run(script, "--help")
    assert code == 0 and err == "" and "argparse" in packages and not packages & SLOW
    assert printed.startswith(f"usage: {script}") and SCRIPTS[script].__doc__.strip() in printed


def test_a_mistyped_flag_is_refused_before_anything_slow_is_imported(script):
    code, _, err, packages = run(script, "--sped", "3")
    one_line(code, err, "--sped")
    assert not packages & SLOW


@pytest.mark.parametrize("flag", [("--steps", "many"), ("--steps", "1.5"), ("--method", "sft"),
                                  ("--lr", "0")], ids=" ".join)
def test_an_impossible_value_is_refused_before_anything_slow_is_imported(flag):
    code, _, err, packages = run("train_lm.py", *flag)
    one_line(code, err, *flag)
    assert not packages & SLOW


def test_help_has_the_flags_in_groups(script, parser):
    groups = {group.title: " ".join(action.dest for action in group._group_actions)
              for group in parser._action_groups if group.title not in ("options", "positional arguments")}
    assert groups == GROUPS[script]
    assert all(f"\n{title}:\n" in parser.format_help() for title in groups)


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
        assert f"(default: {runs.chunk_size(512, torch.device('cpu'))} on a CPU)" in lines["chunk"]


@pytest.mark.parametrize("script", TRAINING, indirect=True)
def test_help_shows_the_recipes_of_the_run_without_arguments(script, parser):
    _, _, epilog = parser.format_help().partition("these models:\n")
    lines = dict(line.split(maxsplit=1) for line in epilog.splitlines())
    assert lines.keys() == TRAINING[script].STAGES.keys()
    for name, recipe in TRAINING[script].STAGES.items():
        shown = dict(word.split() for word in lines[name].removeprefix("--").split(" --"))
        assert shown == {flag.replace("_", "-"): str(value) for flag, value in recipe.items()}


# Which value wins

def arguments(**given):
    return argparse.Namespace(**dict(steps=None, lr=None, warmup=None, beta=1.0, size=None) | given)


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default():
    recipe = dict(steps=5, lr=0.1, beta=2.0)
    assert flags.resolve(arguments(), recipe) == arguments(steps=5, lr=0.1)
    assert flags.resolve(arguments(steps=7, beta=0.5), recipe) == arguments(steps=7, lr=0.1, beta=0.5)


def test_a_flag_of_zero_is_given():
    run = flags.resolve(arguments(warmup=0, lr=0.0), dict(warmup=10, lr=0.1))
    assert (run.warmup, run.lr) == (0, 0.0)


def test_what_a_stage_fixes_wins_over_a_flag():
    run = flags.resolve(arguments(size="large", steps=7), dict(size="old", steps=5), size="old", out="old.pt")
    assert (run.size, run.out, run.steps) == ("old", "old.pt", 7)


def test_resolving_changes_neither_the_flags_nor_the_recipe():
    args, recipe = arguments(epochs=2.0), dict(steps=5)
    flags.resolve(args, recipe, out="y.pt")
    assert args == arguments(epochs=2.0) and recipe == dict(steps=5)


@pytest.mark.parametrize("options, values", [
    ((), dict(method="prt", batch=128, accum=16, lr=2e-5, epochs=2, steps=None, length=1024, warmup=None)),
    (("--batch", "8"), dict(batch=8, lr=2e-5)),
    (("--method", "pretrain"), dict(size="new", batch=64, steps=1000, epochs=None, length=65, base=None)),
    (("--method", "pretrain", "--lr", "1", "--size", "old"), dict(size="old", lr=1.0, weight_decay=0.1)),
    (("--epochs", "3"), dict(epochs=3.0, steps=None)),
    (("--method", "pretrain", "--epochs", "3"), dict(epochs=3.0, steps=None)),
    (("--method", "pretrain", "--epochs", "3", "--steps", "7"), dict(steps=7))], ids=" ".join)
def test_a_run_has_the_values_of_its_flags_and_its_recipe(monkeypatch, options, values):
    trained = []
    monkeypatch.setattr(train_lm, "train", lambda args, device, state: trained.append(vars(args)))
    assert call("train_lm.py", "--data", "gsm8k", *options) == 0
    args, = trained
    assert {flag: args[flag] for flag in values} == values


def test_flags_count_for_every_stage_but_for_what_the_stages_fix(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(train_lm, "train", lambda args, device, state: trained.append(args))
    assert call("train_lm.py", "--out", tmp_path, "--size", "large", "--lr", "0.5") == 0
    assert [args.size for args in trained] == ["old", "new", "large", "large", "large"]
    assert {args.lr for args in trained} == {0.5}
    assert [args.steps for args in trained] == [500, 1000, 900, 900, 300]
    assert [args.data for args in trained] == ["arithmetic-old", "arithmetic-new", *["arithmetic"] * 3]


# Numbers

@pytest.mark.parametrize("kind, text, value", [(int, "1", 1), (int, "1000", 1000), (float, "0.5", 0.5),
                                               (float, "1e-9", 1e-9), (float, "2", 2.0)])
def test_a_positive_number_is_read(kind, text, value):
    number = flags.positive(kind)(text)
    assert number == value and type(number) is kind


@pytest.mark.parametrize("kind, text", [(int, "0"), (int, "-1"), (float, "0"), (float, "-0.5"),
                                        (float, "nan"), (float, "inf"), (float, "-inf")])
def test_a_number_that_is_not_above_zero_and_finite_is_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not above 0"):
        flags.positive(kind)(text)


@pytest.mark.parametrize("text", ["0", "1", "1.5", "nan"])
def test_a_share_is_below_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not above 0 and below 1$"):
        flags.positive(float, below=1)(text)
    assert flags.positive(float, below=1)("0.2") == 0.2


@pytest.mark.parametrize("kind, text", [(int, "1.5"), (int, "x"), (float, "x"), (float, "")])
def test_what_is_no_number_is_refused(kind, text):
    with pytest.raises(ValueError):
        flags.positive(kind)(text)
