"""The language commands with tiny arguments: in processes of their own, under torchrun, and refused."""
import contextlib
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, interrupt
from conftest import call as run
from test_bad_input import contents, one_line

import prt
import train_lm
from models.gpt import GPT, Block
from models.tokenizer import Tokenizer, byte_alphabet

REWARD, NEW, OLD, TUNED = (f"out/arithmetic-0/{name}.pt" for name in ("reward", "new", "old", "tuned"))
SUMS = [f"{a} + {b}" for a in (1, 2, 3, 4) for b in (2, 30, 17, 5, 9, 61)]
TALK = [dict(messages=[dict(role="user", content=f"What is {s}?"), dict(role="assistant", content="Well …"),
                       dict(role="user", content="So?"), dict(role="assistant", content=f"{eval(s)}.")])
        for s in SUMS]
IFEVAL = [dict(key=i, prompt=f"Say {i} in {'very ' * i}few words.", kwargs=[{}],
               instruction_id_list=["punctuation:no_comma"]) for i in (1, 2, 3)]
TRAIN = ("train_lm.py", "--data", "sums.jsonl", "--batch", "8", "--accum", "1", "--length", "120",
         "--lr", "1e-3", "--weight-decay", "0", "--device", "cpu")
TUNE = (*TRAIN, "--base", OLD)
EVAL = ("eval.py", "--reward", REWARD, "--base", NEW, "--device", "cpu", "--new-tokens", "8")


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs a command of the project, in a folder with tiny models and data; returns what it printed."""
    folder = tmp_path_factory.mktemp("lm")
    environment = os.environ | dict(PRT_CACHE=str(tmp_path_factory.mktemp("cache")), OMP_NUM_THREADS="1")

    def run(*command, code=0):
        command = [sys.executable, *(str(ROOT / c) if c.endswith(".py") else c for c in command)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout

    run.folder, run.environment = folder, environment
    sums = [dict(prompt=f" {s} =", response=f" {eval(s)} #### {eval(s)}") for s in SUMS]
    for name, rows in dict(sums=sums, talk=TALK, ifeval=IFEVAL).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "book.txt").write_text("".join(f" {s} = {eval(s)}" for s in SUMS) * 20)
    run.printed = run("train_lm.py", "--steps", "3", "--batch", "8")
    return run


@pytest.fixture
def here(call, monkeypatch):
    """That folder as the current one."""
    monkeypatch.chdir(call.folder)
    return call.folder


def table(*command):
    """The rows of eval's JSON."""
    assert run(*command, "--json", "table.json") == 0
    with open("table.json") as f:
        return json.load(f)["rows"]


def read(name):
    return torch.load(name, weights_only=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a, b, **tolerance):
    a, b = read(a)["model"], read(b)["model"]
    close = (lambda x, y: torch.allclose(x, y, **tolerance)) if tolerance else torch.equal
    return a.keys() == b.keys() and all(close(x, b[name]) for name, x in a.items())


def padded(source, name, rows):
    """The model with more output rows than its tokenizer has tokens, the first of them the likeliest."""
    checkpoint = read(source)
    for key in ("embed_tokens.weight", "lm_head.weight"):
        x = checkpoint["model"][key]
        extra = torch.randn(rows - len(x), x.shape[1], generator=torch.Generator().manual_seed(0))
        checkpoint["model"][key] = torch.cat([x, 5 * extra])
    checkpoint["arch"]["vocab"] = rows
    torch.save(checkpoint, name)
    return name


# The default run

def test_from_nothing_to_the_table(call, monkeypatch, capsys):
    """No arguments but the sizes: five checkpoints, the line that runs eval, the table, the JSON; a second
    run keeps what is there."""
    command = call.printed.splitlines()[-1]
    assert command.startswith(f"python eval.py --reward {REWARD} --base {NEW} --tuned {TUNED} --ref {OLD}")
    printed = call(*command.split()[1:], "--limit", "8", "--new-tokens", "8", "--beta", "0.5", "1",
                   "--json", "first.json", "--device", "cpu")
    found = json.loads((call.folder / "first.json").read_text())
    rows = found.pop("rows")
    assert [(row["method"], row["beta"]) for row in rows] == [
        ("base alone", None), ("base + reward (PRT)", 0.5), ("base + reward (PRT)", 1),
        ("source alone", None), ("source + reward", 1), ("source fine-tuned", None), ("base + EFT", None),
        ("base fine-tuned", None)]
    assert found["examples"] == 8 and found["base"] == NEW and found["rewards"] == [REWARD]
    for row in rows:
        assert row["nll"] > 0 and row["speed"] > 0 and row["mib"] > 0
        assert all(0 <= row[key] <= 1 for key in ("form", "exact", "error", "accuracy"))
        assert re.search(rf"^{re.escape(row['method'])} .*{row['nll']:.3f}", printed, re.M)
    assert rows[0]["kl"] == rows[3]["kl"] == 0 and rows[1]["kl"] > rows[2]["kl"] > 0
    paths = [call.folder / path for path in (OLD, NEW, REWARD, TUNED)]
    for path, method in zip(paths, (None, None, "prt", "ft")):
        checkpoint = read(path)
        assert {"kind", "arch", "tokenizer", "template", "data", "args", "step"} <= set(checkpoint)
        assert "optimizer" not in checkpoint and checkpoint["step"] == 3
        assert checkpoint.get("method") == method
    before = [path.read_bytes() for path in paths]
    monkeypatch.chdir(call.folder)
    capsys.readouterr()
    assert run("train_lm.py", "--steps", "3", "--batch", "8") == 0
    again = capsys.readouterr().out
    assert again.count("is kept") == 5 and "loss" not in again and again.splitlines()[-1] == command
    assert [path.read_bytes() for path in paths] == before


def test_the_printed_command_runs_as_it_stands(call, here):
    """Answers as long as --new-tokens is by default do not fit into the positions of the default models."""
    assert run(*call.printed.splitlines()[-1].split()[1:], "--limit", "1", "--device", "cpu") == 0


def test_default_run_with_other_arguments(here, capfd):
    """Checkpoints of other arguments that are taken for those asked for."""
    before = contents(here)
    one_line(run("train_lm.py", "--steps", "4", "--batch", "8"), capfd.readouterr().err, OLD, "--out")
    assert contents(here) == before


def test_fine_tuned_rows_have_a_divergence(here):
    """KL is from the row's own base, of the fine-tuned models too."""
    rows = {row["method"]: row for row in table(*EVAL, "--tuned", TUNED, "--oracle", TUNED, "--limit", "8")}
    assert rows["source fine-tuned"]["kl"] > 0.01 and rows["base fine-tuned"]["kl"] > 0.01
    assert rows["source fine-tuned"]["nll"] == pytest.approx(rows["base fine-tuned"]["nll"], abs=1e-4)


# Training

def test_reward_init(here):
    """A reward that starts from the base all the same, or forgets which base it was trained on."""
    assert run(*TUNE, "--reward-init", NEW, "--steps", "1", "--lr", "1e-9", "--out", "init.pt") == 0
    found = read("init.pt")
    assert found["source"] == OLD and found["method"] == "prt"
    assert found["arch"]["width"] == read(NEW)["arch"]["width"] != read(OLD)["arch"]["width"]
    assert same("init.pt", NEW, atol=1e-7)
    assert [row["method"] for row in table(*EVAL, "--reward", "init.pt", "--data", "sums.jsonl")] == [
        "base alone", "base + reward (PRT)", "source alone", "source + reward"]


def test_recompute_and_chunk(here, monkeypatch):
    """Activation checkpointing and logits for a few targets at a time change memory, not the weights."""
    sizes, calls, head, forward = [], [], GPT.head, Block.forward
    monkeypatch.setattr(GPT, "head", lambda self, x: sizes.append(len(x)) or head(self, x))
    monkeypatch.setattr(Block, "forward", lambda self, *x: calls.append(x) or forward(self, *x))
    common = (*TUNE, "--steps", "4")
    number = {}
    for name, options in dict(plain=(), recompute=("--recompute",), chunk=("--chunk", "7")).items():
        sizes.clear(), calls.clear()
        assert run(*common, *options, "--out", f"{name}.pt") == 0
        number[name] = len(calls), max(sizes)
    assert number["plain"][1] > 20 and number["chunk"][1] == 7
    assert number["chunk"][0] == number["plain"][0] < number["recompute"][0]
    assert same("plain.pt", "recompute.pt", atol=1e-5) and same("plain.pt", "chunk.pt", atol=1e-5)
    assert not same("plain.pt", OLD, atol=1e-3)


TWICE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import prt, train_lm
given, fit = sys.argv, prt.fit
sys.argv = [*given, "--out", "two.pt"]
train_lm.main()

def stopped(policy, indices, *args, **options):
    return fit(policy, lambda step: 1 / 0 if step == 8 else indices(step), *args, **options)

prt.fit, sys.argv = stopped, [*given, "--out", "half.pt"]
try:
    prt.run(train_lm.main)
except SystemExit as stop:
    assert stop.code == 2
"""


def test_two_processes_equal_one(call, here):
    """Sharded weights that are saved in parts, gradients averaged over processes instead of over targets; an
    unfinished run of two processes that one process cannot go on with."""
    rows = [dict(prompt=" 3 +" * (20 - n), response=f" {n} x" * n) for n in [1, 19] * 12]  # of equal lengths
    (here / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (*TUNE, "--data", "uneven.jsonl", "--steps", "12", "--warmup", "2", "--recompute",
              "--chunk", "7")
    assert run(*common, "--accum", "2", "--out", "one.pt") == 0
    (here / "twice.py").write_text(TWICE)
    call("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(here / "twice.py"),
         *common[1:])
    assert same("one.pt", "two.pt", atol=1e-5) and not same("one.pt", OLD, atol=1e-3)
    assert read("half.pt")["step"] == 6 and not same("half.pt", "two.pt", atol=1e-4)
    assert run(*common, "--out", "half.pt", "--resume") == 0
    assert read("half.pt")["step"] == 12 and "optimizer" not in read("half.pt")
    assert same("half.pt", "two.pt", atol=1e-5)


@pytest.mark.parametrize("options", [(), ("--method", "ft", "--recompute"), ("--method", "pretrain")])
def test_interrupted_command_resumes(here, tmp_path, monkeypatch, options):
    """The command line's --resume: the same weights, bit for bit, as the run that was never stopped."""
    common = (*TUNE, *options, "--steps", "7", "--warmup", "2")
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    assert run(*common, "--out", whole) == 0
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            run(*common, "--out", half)
    assert read(half)["step"] == 1 and not same(whole, half, atol=1e-4)
    assert run(*common, "--out", half, "--resume") == 0
    assert same(whole, half) and read(half)["step"] == 7 and "optimizer" not in read(half)


@pytest.mark.parametrize("method, data", [("prt", "talk.jsonl"), ("ft", "talk.jsonl"), ("prt", "book.txt"),
                                          ("pretrain", "book.txt"), ("pretrain", "sums.jsonl")])
def test_methods_on_own_files(here, tmp_path, capsys, method, data):
    """Each method learns from a file of one's own, and its checkpoint says what eval needs to know."""
    base, out = TRAIN if method == "pretrain" else TUNE, tmp_path / "x.pt"
    assert run(*base, "--data", data, "--method", method, "--steps", "100", "--batch", "4", "--lr", "3e-3",
               "--size", "old", "--out", out) == 0
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 2 and losses[-1] < 0.7 * losses[0]
    found = read(out)
    assert found["data"] == data and found["kind"] == "gpt"
    assert found["template"] == ("<|user|>\n{}\n<|assistant|>\n" if data == "talk.jsonl" else "{}")
    assert [found.get(k) for k in ("method", "source", "beta")] == (
        [None] * 3 if method == "pretrain" else [method, OLD, 1.0])


@pytest.mark.parametrize("method, options, steps", [
    ("prt", ("--epochs", "2.5"), 8), ("ft", ("--steps", "5", "--epochs", "9"), 5), ("prt", (), 6),
    ("pretrain", ("--epochs", "2"), None), ("pretrain", ("--steps", "5", "--epochs", "2"), 5)])
def test_epochs(here, tmp_path, monkeypatch, method, options, steps):
    """--epochs is heard where --steps is not given, also by a method whose recipe has steps of its own."""
    begun = []
    monkeypatch.setattr(prt, "fit", lambda policy, indices, fetch, **given: begun.append(given["steps"]))
    base = TRAIN if method == "pretrain" else TUNE
    assert run(*base, "--batch", "8", "--method", method, *options, "--out", tmp_path / "x.pt") == 0
    assert begun == [steps] if steps else begun[0] < 50


def test_only_answers_are_learnt(here, tmp_path, monkeypatch):
    """Prompts in the loss: train_lm.py's own way from the file to the targets of a step."""
    seen = []
    fit = prt.fit

    def spy(policy, indices, fetch, **options):
        for (_, _), targets, cached in (fetch(torch.tensor([i]), None) for i in range(len(TALK))):
            assert cached is None
            seen.append(targets.tolist())
        return fit(policy, indices, fetch, **options)

    monkeypatch.setattr(prt, "fit", spy)
    assert run(*TUNE, "--data", "talk.jsonl", "--steps", "1", "--out", tmp_path / "x.pt") == 0
    tokenizer = Tokenizer(read(OLD)["tokenizer"], "old")
    assert [tokenizer.decode(ids) for ids in seen] == [
        f"Well …<|endoftext|>{eval(s)}.<|endoftext|>" for s in SUMS]


def test_folder_without_a_test_split(here, tmp_path):
    """A run that is trained and saved must not end as a failure because there is nothing to score it on."""
    (tmp_path / "data").mkdir()
    shutil.copy("sums.jsonl", tmp_path / "data/train.jsonl")
    assert run(*TUNE, "--data", tmp_path / "data", "--steps", "2", "--out", tmp_path / "x.pt") == 0
    assert read(tmp_path / "x.pt")["step"] == 2


def test_folder_with_a_test_split(here, tmp_path, capsys):
    """What is scored at the end: the base and the reward on it, fine-tuning as itself, of a base itself
    alone."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        shutil.copy("sums.jsonl", tmp_path / f"data/{split}.jsonl")
    nll = {}
    for method in ("prt", "ft", "pretrain"):
        out = tmp_path / f"{method}.pt"
        base = TRAIN if method == "pretrain" else TUNE
        assert run(*base, "--data", tmp_path / "data", "--steps", "2", "--method", method, "--out", out) == 0
        nll[method] = dict(re.findall(r"^(\S+): NLL ([\d.]+) per token", capsys.readouterr().out, re.M))
    assert [*nll["prt"]] == [OLD, f"{tmp_path}/prt.pt"] and [*nll["ft"]] == [OLD, f"{tmp_path}/ft.pt"]
    assert [*nll["pretrain"]] == [f"{tmp_path}/pretrain.pt"]
    rows = table(*EVAL, "--reward", tmp_path / "prt.pt", "--base", OLD, "--tuned", tmp_path / "ft.pt")
    rows = {row["method"]: f"{row['nll']:.3f}" for row in rows}
    assert nll["prt"] == {OLD: rows["base alone"], f"{tmp_path}/prt.pt": rows["base + reward (PRT)"]}
    assert nll["ft"] == {OLD: rows["base alone"], f"{tmp_path}/ft.pt": rows["source fine-tuned"]}
    assert rows["source fine-tuned"] == rows["base + EFT"] != rows["base + reward (PRT)"]


# Evaluation

COLOURS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import prt, eval
os.environ.pop("NO_COLOR", None)
prt.run(eval.main)
print("second", flush=True)
os.environ["NO_COLOR"] = "1"
prt.run(eval.main)
"""


def test_prompt_answers_twice(call, here, capsys):
    """No escape codes where output is no terminal, or where NO_COLOR is set; the same text in colours."""
    command = (*EVAL, "--prompt", "Tom has 3 apples and buys 4 more. How many?")
    assert run(*command) == 0
    plain = capsys.readouterr().out
    assert re.fullmatch(r"base alone:.*\n\nbase \+ reward \(PRT\):.*\n\n", plain, re.S)
    assert "\033" not in plain
    terminal, side = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", COLOURS, *command[1:]], cwd=call.folder, stdout=side,
                               stderr=subprocess.DEVNULL, env=call.environment)
    os.close(side)
    printed = b""
    with contextlib.suppress(OSError):  # Linux, once the process has closed its side
        while part := os.read(terminal, 1000):
            printed += part
    os.close(terminal)
    assert process.wait() == 0
    coloured, uncoloured = printed.decode().replace("\r\n", "\n").split("second\n")
    assert uncoloured == plain
    assert coloured.count("\033[48;5;") == coloured.count("\033[0m") > 0
    assert re.sub(r"\033\[[\d;]*m", "", coloured) == plain


def test_prompt_is_asked_in_the_form_of_training(here, monkeypatch, capsys):
    """The template of the reward's data around the prompt, and what the answer is after its end token."""
    tokenizer, asked = Tokenizer(read(OLD)["tokenizer"], "old"), []

    def answer(base, rewards, ids, *, end, **options):
        asked.append(tokenizer.decode(ids[0].tolist()))
        more = tokenizer.encode(" ü = 7") + [end] + tokenizer.encode(" unseen")
        return torch.cat([ids, torch.tensor([more])], 1)

    monkeypatch.setattr(prt, "generate", answer)
    assert run(*TUNE, "--data", "talk.jsonl", "--steps", "1", "--out", "talk.pt") == 0
    capsys.readouterr()
    assert run(*EVAL, "--reward", "talk.pt", "--prompt", "A {} b?") == 0
    assert asked == ["<|user|>\nA {} b?\n<|assistant|>\n"] * 2
    assert capsys.readouterr().out == "base alone: ü = 7\n\nbase + reward (PRT): ü = 7\n\n"


def test_answers_are_scored(here, tmp_path, monkeypatch):
    """Answers in the order of lengths that are compared with problems in the file's order; numbers that
    differ in form alone; right numbers behind the first one, or without the form."""
    tokenizer, asked = Tokenizer(read(OLD)["tokenizer"], "old"), {}
    wanted = {"a": "1,000", "bb b b b": "-7", "c c": "12", "d": "5", "e e e": "0.50"}
    given = {"a": "#### 1000", "bb b b b": "so 3 ####-7.", "c c": "#### 13 #### 12", "d": "5",
             "e e e": "#### .5"}
    (tmp_path / "x.jsonl").write_text("".join(
        json.dumps(dict(prompt=p, response=f"{p} #### {answer}")) + "\n" for p, answer in wanted.items()))

    def answer(base, rewards, ids, *, end, pad, **options):
        starts = [0] * len(ids) if pad is None else pad.tolist()
        prompts = [tokenizer.decode(row[start:].tolist()) for start, row in zip(starts, ids)]
        asked.update(dict.fromkeys(prompts))
        new = [tokenizer.encode(" " + given[prompt]) + [end] for prompt in prompts]
        width = max(map(len, new))
        return torch.cat([ids, torch.tensor([row + [end] * (width - len(row)) for row in new])], 1)

    monkeypatch.setattr(prt, "generate", answer)
    row = table(*EVAL, "--data", tmp_path / "x.jsonl", "--batch", "3")[0]
    assert asked.keys() == wanted.keys()
    assert row["exact"] == 3 / 5 and row["form"] == 4 / 5
    assert row["error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


def test_ifeval_responses(here, tmp_path, capsys, monkeypatch):
    """Files that IFEval's scorer can read: a response to each prompt, in the order of the prompts."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    folder = tmp_path / "responses"
    command = (*EVAL, "--data", "ifeval.jsonl", "--batch", "2", "--responses", folder)
    assert run(*command, "--beta", "1", "0.5", "--tuned", TUNED) == 0
    printed = capsys.readouterr().out
    assert "pip install lm_eval[ifeval]" in printed
    rows = {path.name: lines(path) for path in folder.iterdir()}
    assert rows.keys() == {"base-alone.jsonl", "base-reward-prt-1.jsonl", "base-reward-prt-0.5.jsonl",
                           "source-alone.jsonl", "source-reward-1.jsonl", "source-fine-tuned.jsonl",
                           "base-eft.jsonl"}
    assert all(str(folder / name) in printed for name in rows)
    for found in rows.values():
        assert [row["prompt"] for row in found] == [doc["prompt"] for doc in IFEVAL]
        assert all(row.keys() == {"prompt", "response"} for row in found)
        assert all(isinstance(row["response"], str) for row in found)
    alone, one, half = (rows[f"base-{name}.jsonl"] for name in ("alone", "reward-prt-1", "reward-prt-0.5"))
    assert alone != one and len({row["response"] for row in alone + one + half}) > 1
    assert run(*command, "--batch", "1", "--limit", "2") == 0
    assert lines(folder / "base-reward-prt-1.jsonl") == one[:2]


def test_ifeval_rewards_of_similar_names(here, tmp_path, monkeypatch):
    """The responses with reward-2.pt over those with reward-1.pt."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for n in (1, 2):
        shutil.copy(REWARD, tmp_path / f"reward-{n}.pt")
    assert run(*EVAL, "--reward", tmp_path / "reward-1.pt", tmp_path / "reward-2.pt", "--limit", "1",
               "--data", "ifeval.jsonl", "--responses", tmp_path / "responses") == 0
    assert len(list((tmp_path / "responses").iterdir())) == 6  # base, two rewards, their sum, source twice


def test_samples_are_reproducible(here, tmp_path, monkeypatch):
    """--temperature and --top-p draw the same answers for a seed, others for another; without temperature
    the seed says nothing."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)

    def responses(*options):
        assert run(*EVAL, "--data", "ifeval.jsonl", "--responses", tmp_path, *options) == 0
        return (tmp_path / "base-reward-prt-1.jsonl").read_text()

    hot = ("--temperature", "1", "--top-p", "0.9")
    assert responses(*hot, "--seed", "1") == responses(*hot, "--seed", "1") != responses(*hot, "--seed", "2")
    greedy = responses()
    assert greedy == responses("--seed", "1") != responses(*hot, "--seed", "1")
    assert greedy == responses("--temperature", "1", "--top-p", "1e-9")


def test_limit(here):
    """The first examples alone, of a file that the reward was not trained on."""
    assert run(*EVAL, "--data", "sums.jsonl", "--limit", "5", "--json", "five.json") == 0
    with open("five.json") as f:
        found = json.load(f)
    assert found["examples"] == 5 and found["data"] == "sums.jsonl"
    whole = table(*EVAL, "--data", "sums.jsonl")
    assert whole[0]["nll"] != found["rows"][0]["nll"] and len(whole) == len(found["rows"])


def test_several_rewards_add_up(here):
    """The sum of a reward with itself is that reward at half its beta."""
    common = (*EVAL, "--limit", "8")
    rows = table(*common, "--reward", REWARD, REWARD)
    assert [row["method"] for row in rows] == ["base alone", *[f"base + {REWARD} (PRT)"] * 2,
                                               "base + sum of rewards", "source alone", "source + reward"]
    half = table(*common, "--beta", "0.5")[1]
    assert abs(rows[3]["nll"] - half["nll"]) < 1e-5 and abs(rows[3]["kl"] - half["kl"]) < 1e-5
    assert rows[1]["nll"] == rows[2]["nll"] != rows[3]["nll"]


def test_padded_output_matrices(here, capsys):
    """Output rows that no token has: where models differ in them, the table is that of the unpadded ones."""
    base, reward = padded(NEW, "new640.pt", 640), padded(REWARD, "reward600.pt", 600)
    plain = table(*EVAL, "--limit", "4")
    mixed = table(*EVAL, "--limit", "4", "--base", base, "--reward", reward)
    assert "cut to the tokenizer's 550" in capsys.readouterr().out
    for a, b in zip(plain, mixed):
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-4) and a["kl"] == pytest.approx(b["kl"], abs=1e-4)


def test_output_matrices_padded_alike(here):
    """As those of Qwen2.5's smaller models: a row without a token is chosen, and has no text."""
    models = [padded(path, f"{i}-640.pt", 640) for i, path in enumerate((NEW, REWARD, OLD))]
    common = ("eval.py", "--device", "cpu", "--base", models[0], "--reward", models[1], "--ref", models[2])
    rows = table(*common, "--new-tokens", "8", "--limit", "4")
    assert rows[0]["nll"] == pytest.approx(table(*EVAL, "--limit", "4")[0]["nll"], abs=1e-4)


def test_a_padded_reward_twice(here):
    """One checkpoint named twice is two models: both must be cut, and both must be on the device."""
    reward = padded(REWARD, "reward640.pt", 640)
    rows = table(*EVAL, "--reward", reward, reward, "--limit", "4")
    assert rows[3]["nll"] == pytest.approx(table(*EVAL, "--beta", "0.5", "--limit", "4")[1]["nll"], abs=1e-4)


# Bad input

IN = ("train_lm.py --base {old} --data {data} --steps 2 --batch 8 --accum 1 --length 64 --device cpu "
      "--out {out}/x.pt ")
USE = "eval.py --reward {reward} --base {new} --new-tokens 8 --limit 4 --device cpu --json {out}/x.json "
CASES = {
    "unknown data": (IN + "--data sumz", "--data sumz", "arithmetic, gsm8k"),
    "unknown data of eval": (USE + "--data sumz", "--data sumz", "arithmetic, gsm8k"),
    "malformed line": (IN + "--data {out}/bad.jsonl", "{out}/bad.jsonl line 2"),
    "malformed line of eval": (USE + "--data {out}/bad.jsonl", "{out}/bad.jsonl line 2"),
    "empty file": (IN + "--data {out}/empty.jsonl", "{out}/empty.jsonl"),
    "empty file of eval": (USE + "--data {out}/empty.jsonl", "{out}/empty.jsonl"),
    "not UTF-8": (IN + "--data {out}/latin.jsonl", "{out}/latin.jsonl"),
    "eval of numbers": (USE + "--data {out}/numbers.jsonl", "{out}/numbers.jsonl line 1"),
    "eval of IFEval without a prompt": (USE + "--data {out}/ifeval.jsonl", "{out}/ifeval.jsonl"),
    "eval of an empty prompt": (USE + "--data {out}/unasked.jsonl", "{out}/unasked.jsonl"),
    "eval of a text file": (USE + "--data {book}", "{book}"),
    "eval of pretraining data": (USE + "--data arithmetic-old", "arithmetic-old", "test split"),
    "no tokenizer": (IN + "--base {bare}", "{bare}", "tokenizer.json"),
    "no tokenizer of eval": (USE + "--base {bare}", "{bare}", "tokenizer.json"),
    "no tokenizer of the reward": (IN + "--reward-init {bare}", "{bare}", "tokenizer.json"),
    "other tokenizer": (IN + "--reward-init {llama}", "{llama}", "{old}", "550 tokens", "400 ("),
    "other tokenizer of eval": (USE + "--base {llama}", "{llama}", "{reward}", "550 tokens", "400 ("),
    "larger tokenizer than the matrix": (IN + "--base {short}", "{short}", "512", "550 tokens"),
    "no end token": (IN + "--base {endless}", "{endless}", "eos_token_id"),
    "image base": (IN + "--base {clip}", "{clip} is a base for images", "text"),
    "image base of eval": (USE + "--base {clip}", "{clip} is a base for images", "text"),
    "image reward": (USE + "--reward {shapes}", "{new} is a base for text", "images"),
    "image reward as second": (USE + "--reward {reward} {shapes}", "{shapes}", "images"),
    "text reward as second": (USE + "--base {clip} --reward {shapes} {reward}", "{reward}", "images"),
    "image model as reward's start": (IN + "--reward-init {clip}", "{clip} is a base for images", "text"),
    "reward as base": (IN + "--base {reward}", "{reward} is a reward"),
    "tuned as base": (IN + "--base {tuned}", "{tuned} is a fine-tuned"),
    "reward as base of eval": (USE + "--base {reward}", "{reward} is a reward"),
    "reward as reference": (USE + "--ref {reward}", "{reward} is a reward"),
    "base as reward": (USE + "--reward {old}", "{old} is a base"),
    "base as tuned": (USE + "--tuned {old}", "{old} is a base"),
    "no such base": (IN + "--base {out}/none.pt", "{out}/none.pt"),
    "no such reward": (USE + "--reward {out}/none.pt", "{out}/none.pt"),
    "eval without test data": (USE + "--reward {file}", "sums.jsonl", "test split"),
    "long prompt": (USE + "--prompt " + "long" * 300, "256 positions", "--new-tokens"),
    "long answer": (USE + "--new-tokens 255", "255", "256 positions"),
    "no response within length": (IN + "--length 2", "24 examples", "--length 2"),
    "text below length": (IN + "--method pretrain --length 200000", "--length 200000"),
    "longer than the positions": (IN + "--data {out}/long.jsonl --length 1024", "256", "--length"),
    "out exists": (IN + "--out {reward}", "{reward} exists", "--resume"),
    "resume without file": (IN + "--resume", "--resume", "{out}/x.pt"),
    "resume of a finished run": (IN + "--resume --out {reward}", "{reward}", "step 3"),
    "resume with another length": (IN + "--resume --out {half} --length 63", "{half}", "--length"),
    "resume with another start": (IN + "--resume --out {half} --reward-init {new}", "--reward-init"),
    "default run over another program's file": ("train_lm.py --out {out}/demo", "{out}/demo/old.pt", "--out"),
    "uneven batch": (IN + "--accum 3", "8", "3"),
    "warm-up": (IN + "--warmup 2", "--warmup"),
    "no chunk": (IN + "--chunk 0", "--chunk"),
    "no length": (IN + "--length 0", "--length"),
    "no epochs": (IN + "--epochs 0", "--epochs"),
    "unknown size": (IN + "--size huge", "--size"),
    "no limit": (USE + "--limit 0", "--limit"),
    "zero top-p": (USE + "--top-p 0", "--top-p"),
    "negative temperature": (USE + "--temperature -1", "--temperature"),
    "temperature is no number": (USE + "--temperature nan", "--temperature"),
    "no new tokens": (USE + "--new-tokens 0", "--new-tokens"),
}


def small_tokenizer():
    """400 tokens: the bytes, and numbers of two and three digits."""
    vocab = {c: i for i, c in enumerate(byte_alphabet())}
    merges = [f"{a} {b}" for a in "123456789" for b in "0123456789"]
    merges += [f"{a} {b}" for a in (10, 20, 30, 40, 50) for b in "0123456789"] + ["a b", "a c", "a d", "a e"]
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    return json.dumps(dict(model=dict(vocab=vocab, merges=merges),
                           pre_tokenizer=dict(type="ByteLevel", use_regex=True)))


@pytest.fixture
def paths(here, tiny, tmp_path):
    """The names that the command lines above use."""
    out = tmp_path / "out"
    (out / "demo").mkdir(parents=True)
    torch.save(dict(model={}), out / "demo/old.pt")
    for name, content in {"bad.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": 1}\n',
                          "numbers.jsonl": "5\n", "empty.jsonl": "",
                          "unasked.jsonl": '{"prompt": "", "response": "b"}\n',
                          "ifeval.jsonl": '{"key": 1, "instruction_id_list": [], "kwargs": []}\n',
                          "long.jsonl": json.dumps(dict(prompt="a", response="long" * 300)) + "\n"}.items():
        (out / name).write_text(content)
    (out / "latin.jsonl").write_bytes('{"prompt": "ü", "response": "b"}'.encode("latin-1"))
    torch.save(read(REWARD) | dict(data="sums.jsonl"), out / "file.pt")
    names = dict(out=out, file=out / "file.pt", half=out / "half.pt", old=OLD, new=NEW, reward=REWARD,
                 tuned=TUNED, clip=tiny.old, shapes=tiny.reward, data="sums.jsonl", book="book.txt",
                 bare=FIXTURES / "llama3")
    for name, fixture in dict(llama="llama2", short="llama2", endless="qwen2").items():
        names[name] = shutil.copytree(FIXTURES / fixture, out / name)
    (out / "llama/tokenizer.json").write_text(small_tokenizer())
    (out / "endless/tokenizer.json").write_text(small_tokenizer())
    (out / "short/tokenizer.json").write_text(train_lm.TOKENIZER.read_text())
    return names


def half_run(paths, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            run(*IN.format(**paths).split(), "--out", paths["half"])


@pytest.mark.parametrize("case", CASES)
def test_refused(paths, monkeypatch, capfd, case):
    """A traceback, an error that does not name the file or option, or files written before the refusal."""
    command, *words = (text.format(**paths) for text in CASES[case])
    if str(paths["half"]) in command:
        half_run(paths, monkeypatch)
    before = contents(paths["out"], Path.cwd())
    capfd.readouterr()
    code = run(*command.split())
    one_line(code, capfd.readouterr().err, *words)
    assert contents(paths["out"], Path.cwd()) == before


def test_what_the_refused_runs_lack(paths, capfd):
    """The command lines above must fail for their own reason: as they stand here, they run."""
    assert run(*IN.format(**paths).split()) == 0
    assert run(*USE.format(**paths).split()) == 0
    assert run(*USE.format(**paths).split(), "--prompt", "short") == 0
    assert run(*IN.format(**paths).split(), "--base", paths["llama"], "--out", paths["out"] / "y.pt") == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("case", ["no tokenizer", "malformed line of eval"])
def test_refused_by_a_process(paths, call, case):
    """Warnings of libraries beside the one line, or another exit code once the interpreter ends."""
    command, *words = (text.format(**paths) for text in CASES[case])
    script, *argv = command.split()
    done = subprocess.run([sys.executable, ROOT / script, *argv], cwd=call.folder, env=call.environment,
                          capture_output=True, text=True)
    one_line(done.returncode, done.stderr, *words)
