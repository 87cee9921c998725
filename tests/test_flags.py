"""Flags: --help, refused ones, and which value wins; bad input of the training scripts."""
import re
import shutil
from types import SimpleNamespace

import pytest
from conftest import (
    FIXTURES,
    PRETRAIN,
    SCRIPTS,
    TRAIN,
    TUNE_LM,
    assert_refused,
    call,
    contents,
    interrupted,
    one_line,
)

import eval as eval_script
import train_lm
from models import examples

# The flags that have no default: a run or a table does without them.
NO_DEFAULT = {
    "train_vision.py": "resume keep-best augment compile",
    "train_lm.py": "resume keep-best chat-template drop recompute compile",
    "eval.py": "run reward base tuned-source tuned-base tasks chat-template limit json picture answers "
               "prompt prompts speculative compile"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_docstring_and_the_defaults_of_the_flags_in_groups(script, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "10000")  # one line per flag
    assert call(script, "--help") == 0
    printed, err = capfd.readouterr()
    assert err == "" and printed.startswith(f"usage: {script}") and SCRIPTS[script].__doc__.strip() in printed
    assert re.search(r"\noptions:\n  -h, --help .*\n\n(models|run):\n", printed)  # the rest has groups
    lines = dict(re.findall(r"^  --(\S+)(.*)", re.sub(r"\n {20,}", " ", printed), re.M))
    assert {flag for flag, line in lines.items() if "(default: " not in line} == {*NO_DEFAULT[script].split()}
    if script == "eval.py":
        for flag in ("batch", "temperature", "top_p", "seed"):
            value = eval_script.DEFAULTS[flag]
            assert f"(default: {value:g})" in lines[flag.replace("_", "-")]
        return
    recipes = SCRIPTS[script].RECIPES
    assert {*recipes} == {"prt", "ticket", "lora", "pretrain"}
    for flag in {flag for recipe in recipes.values() for flag in recipe} - {"size", "epochs"}:
        shown = re.search(r"\(default: ([^;)]*)((?:; \w+: [^;)]*)*)\)", lines[flag.replace("_", "-")])
        others = dict(re.findall(r"; (\w+): ([^;)]*)", shown[2]))
        for name, recipe in recipes.items():
            value, text = recipe.get(flag, "none"), others.get(name, shown[1])
            assert value is None or text in (str(value), str(value or 0)), flag
    assert f"(default: {recipes['pretrain']['size']})" in lines["size"]
    if script == "train_lm.py":
        assert f"(default: {recipes['prt']['epochs']})" in lines["epochs"]
        assert "(default: 512 on a CPU)" in lines["chunk"]


# Refused flags and bad input

NUMBERS = "0 -1 nan inf -inf x"
VALUES = {
    "train_vision.py": {
        "--sped": "3", "--method": "sft", "--size": "huge", "--ticket": "golden", "--reward-init": "head",
        "--steps": "0 -1 1.5 x", "--batch": "0 -8 1.5", "--accum": "0 -1", "--seed": "x", "--warmup": "1.5",
        "--lr": NUMBERS, "--beta": NUMBERS, "--alpha": "x", "--weight-decay": "x",
        "--hold-out": "-1 1 1.5 nan", "--keep": "0 1", "--freeze": "1"},
    "train_lm.py": {"--size": "huge", "--length": "0 1.5", "--epochs": "0 nan", "--chunk": "0"},
    "eval.py": {"--beta": "0 nan x", "--batch": "0 x", "--limit": "0", "--new-tokens": "0", "--top-p": "0"}}


@pytest.mark.parametrize("script, flag, value", [
    (script, flag, value) for script, flags in VALUES.items() for flag, values in flags.items()
    for value in values.split()])
def test_an_impossible_value_is_refused_in_one_line(script, flag, value, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    one_line(call(script, f"{flag}={value}"), capfd.readouterr().err, flag, value)
    assert not list(tmp_path.iterdir())


TUNE = " ".join(TUNE_LM) + " --steps 2 --length 64 --out {out}/x.pt "
# The names for text are in {text[...]}, those for images in braces alone.
CASES = {
    "size of no pretraining": (TRAIN + "--size tiny", "--size has no effect here"),
    "size of a source to pretrain": (TRAIN + "--method pretrain --size tiny", "--size has no effect here"),
    "captions that a source cannot read": (TRAIN + f"--method pretrain --source {FIXTURES / 'openclip_vit'}",
                                           "--source", "openclip_vit", "(49408, ", "(512, 77)"),
    "size of the run without flags": ("train_lm.py --size large", "--size has no effect here"),
    "unknown data": (TRAIN + "--data shapez", "--data shapez", "cifar100"),
    "no such source": (TRAIN + "--source {none}/base.pt", "{none}/base.pt"),
    "reward as source": (TRAIN + "--source {reward}", "{reward} is a reward"),
    "out exists": (TRAIN + "--out {reward}", "{reward} exists", "--resume"),
    "resume without file": (TRAIN + "--resume", "--resume", "{out}/x.pt"),
    "resume of a finished run": (TRAIN + "--resume --out {reward}", "--resume", "finished, with step 2",
                                 "--reward-init {reward}"),
    "resume with another source": (TRAIN + "--resume --out {half} --source {new}", "{half}", "--source"),
    "resume of another program's file": (TRAIN + "--resume --out {foreign}", "--resume", "{foreign}"),
    "run without flags over foreign files": ("train_vision.py --out {demo}", "{demo}/old.pt", "--out"),
    "nothing held out": (TRAIN + "--hold-out 0.02", "--hold-out 0.02 of 9"),
    "no such device": (TRAIN + "--device gpu", "--device gpu", "the CPU and "),
    "uneven batch": (TRAIN + "--accum 3", "8", "3"),
    "unknown text": (TUNE + "--data sumz", "--data sumz", "arithmetic, gsm8k"),
    "malformed line": (TUNE + "--data {text[root]}/bad.jsonl", "{text[root]}/bad.jsonl line 2"),
    "no tokenizer of the reward": (TUNE + "--reward-init {text[bare]}", "{text[bare]}", "tokenizer.json"),
    "other tokenizer": (TUNE + "--reward-init {text[root]}/llama", "/llama", "{text[old]}", "550 tokens"),
    "large tokenizer": (TUNE + "--source {text[root]}/short", "{text[root]}/short", "512", "550 tokens"),
    "no end token": (TUNE + "--source {text[root]}/endless", "{text[root]}/endless", "eos_token_id"),
    "image source": (TUNE + "--source {old}", "{old} is a base for images", "text"),
    "image model as reward's start": (TUNE + "--reward-init {old}", "{old} is a base for images", "text"),
    "no response within length": (TUNE + "--length 2", "24 examples", "--length 2"),
    "text below length": (TUNE + "--method pretrain --length 200000", "--length 200000"),
    "longer than the positions": (TUNE + "--data {text[root]}/long.jsonl --length 1024", "256", "--length"),
    "share to keep of no ticket": (TRAIN + "--keep 0.5", "--keep and --freeze", "--ticket"),
    "share to freeze of no ticket": (TRAIN + "--freeze 0.5", "--keep and --freeze", "--ticket"),
    "two starts of a ticket": (TRAIN + "--ticket base --reward-init random", "--reward-init"),
    "pretrained ticket": (TRAIN + "--ticket base --method pretrain", "--ticket", "pretrain"),
    "start of no reward": (TRAIN + "--reward-init random --method ft", "--reward-init", "ft"),
    "images' ticket of no source": ("train_vision.py --ticket base", "--ticket", "--source"),
    "texts' ticket of no source": ("train_lm.py --ticket base", "--ticket", "--source"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_and_touches_no_file(in_texts, paths, malformed, capfd, case):
    assert_refused(CASES[case], paths | dict(text=malformed), capfd, paths["out"], paths["root"],
                   malformed["root"], in_texts.folder)


def test_the_refused_command_lines_run_without_their_fault(in_texts, paths, malformed, capfd):
    want = [paths["out"] / name for name in ("a/new/folder/x.pt", "y.pt", "z.pt")]
    for command, out in zip((TRAIN, TUNE, TUNE + f"--source {malformed['root']}/llama"), want):
        assert call(*command.format(**paths).split(), "--out", out) == 0
    assert capfd.readouterr().err == "" and sorted(contents(paths["out"])) == want


@pytest.mark.parametrize("command", [TRAIN, PRETRAIN])
def test_a_run_does_not_resume_with_other_classes(paths, capfd, command):
    data = shutil.copytree(paths["data"], paths["out"] / "data")
    command = [*command.format(**paths).split(), "--data", data]
    interrupted(*command)
    (data / "classnames.txt").write_text("cyan\npink\nwhite\n")
    before = contents(paths["out"])
    capfd.readouterr()
    one_line(call(*command, "--resume"), capfd.readouterr().err, paths["out"] / "x.pt", "classes")
    assert contents(paths["out"]) == before


# Which value wins

@pytest.mark.parametrize("options, values", [
    ("--batch 8 --warmup 0 --out y.pt", dict(batch=8, lr=2e-5, warmup=0, out="y.pt")),
    ("", dict(method="prt", batch=128, accum=None, lr=2e-5, epochs=2, steps=None, length=1024, warmup=None,
              weight_decay=0.0, beta=1.0, source="Qwen/Qwen2.5-0.5B", out="out/gsm8k-prt.pt")),
    ("--data some/where --method ft --source x.pt", dict(lr=2e-5, source="x.pt", out="out/where-ft.pt")),
    ("--method pretrain --lr 1 --size old", dict(size="old", lr=1.0, weight_decay=0.1)),
    ("--method pretrain --weight-decay 0", dict(size="new", batch=64, steps=1000, length=65, source=None,
                                                weight_decay=0.0, out="out/gsm8k-pretrain.pt")),
    ("--method pretrain --epochs 3", dict(epochs=3.0, steps=None)),
    ("--ticket random --keep 0.1", dict(lr=0.01, keep=0.1, freeze=0.0, batch=128))])
def test_a_run_has_the_values_of_its_flags_and_its_recipe(options, values):
    args = vars(train_lm.parse(["--data", "gsm8k", *options.split()]))
    assert {flag: args[flag] for flag in values} == values


@pytest.mark.parametrize("code", [0, 3])
def test_the_run_without_flags_applies_those_that_are_given_to_every_stage(tmp_path, monkeypatch, code):
    """Catches: A flag replaces what makes a stage what it is, or a table that fails counts as success."""
    trained, commands = [], []
    monkeypatch.setattr(train_lm, "train", lambda args, device, state: trained.append(args))
    monkeypatch.setattr(examples.subprocess, "run", lambda command, **options: (
        commands.append(command[1:]), SimpleNamespace(returncode=code))[1])
    monkeypatch.chdir(tmp_path)
    options = "--data arithmetic --out folder --lr 0.5 --reward-init random --seed 5 --device cpu"
    assert call("train_lm.py", *options.split()) == code
    values = "out", "data", "size", "source", "method", "reward_init", "steps"
    assert [[getattr(args, value) for value in values] for args in trained] == [
        ["folder/old.pt", "arithmetic-old", "old", None, "pretrain", None, 500],
        ["folder/new.pt", "arithmetic-new", "new", None, "pretrain", None, 1000],
        ["folder/reward.pt", "arithmetic", None, "folder/old.pt", "prt", "random", 900],
        ["folder/tuned_source.pt", "arithmetic", None, "folder/old.pt", "ft", None, 900],
        ["folder/tuned_base.pt", "arithmetic", None, "folder/new.pt", "ft", None, 300]]
    assert {(args.lr, args.seed, args.resume) for args in trained} == {(0.5, 5, False)}
    assert commands == [[str(examples.EVAL), "--run", "folder", "--device", "cpu"]]
