"""train_lm.py: the run without arguments, methods on other files, two processes, resumed runs, bad input."""
import re
import shutil

import pytest
import torch
from conftest import (
    EVAL_LM,
    FIXTURES,
    NEW,
    OLD,
    ORACLE,
    REWARD,
    SUMS,
    TRAIN_LM,
    TUNE_LM,
    TUNED,
    assert_refused,
    call,
    contents,
    interrupt,
    jsonl,
    one_line,
    read,
    same,
    two_processes,
)

import prt
from models.gpt import GPT, Block
from models.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("in_texts")


def start(method):
    """Returns the start of a command line: a method tunes the old base, or begins from nothing."""
    return TRAIN_LM if method == "pretrain" else TUNE_LM


# The run without arguments

def test_without_arguments_it_makes_five_models_and_prints_how_to_use_them(texts):
    assert texts.printed.splitlines()[-1] == "python eval.py --run out/arithmetic-0"
    for path, method in {OLD: None, NEW: None, REWARD: "prt", TUNED: "ft", ORACLE: "ft"}.items():
        checkpoint = read(path)
        assert {"kind", "arch", "tokenizer", "template", "data", "args", "step"} <= set(checkpoint)
        assert "optimizer" not in checkpoint and checkpoint["step"] == 3
        assert checkpoint.get("method") == method


def test_a_second_run_without_arguments_keeps_the_models_that_are_there(texts, capsys):
    before = contents(texts.folder)
    assert call("train_lm.py", "--steps", 3, "--batch", 8) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+) is finished", printed, re.M) == [OLD, NEW, REWARD, TUNED, ORACLE]
    assert "loss" not in printed
    assert printed.splitlines()[-1] == texts.printed.splitlines()[-1]
    assert contents(texts.folder) == before


def test_a_run_without_arguments_takes_no_models_of_other_arguments(texts, capfd):
    """Catches: Checkpoints of other arguments are taken for those asked for."""
    before = contents(texts.folder)
    one_line(call("train_lm.py", "--steps", 4, "--batch", 8), capfd.readouterr().err, OLD, "--out")
    assert contents(texts.folder) == before


# Training

@pytest.mark.parametrize("method, data", [("prt", "talk.jsonl"), ("ft", "talk.jsonl"), ("prt", "book.txt"),
                                          ("pretrain", "book.txt"), ("pretrain", "sums.jsonl")])
def test_each_method_learns_from_a_file(tmp_path, capsys, method, data):
    """Its checkpoint says what eval.py needs to know."""
    out = tmp_path / "x.pt"
    assert call(*start(method), "--data", data, "--method", method, "--steps", 48, "--batch", 4, "--lr", 3e-3,
                "--size", "old", "--out", out) == 0
    quarters = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(quarters) == 4 and sum(quarters[2:]) < 0.7 * sum(quarters[:2])
    checkpoint = read(out)
    assert checkpoint["data"] == data and checkpoint["kind"] == "gpt"
    assert checkpoint["template"] == ("<|user|>\n{}\n<|assistant|>\n" if data == "talk.jsonl" else "{}")
    assert [checkpoint.get(k) for k in ("method", "source", "beta")] == (
        [None] * 3 if method == "pretrain" else [method, OLD, 1.0])


@pytest.mark.parametrize("method, options, steps", [
    ("prt", ("--epochs", "2.5"), 8), ("ft", ("--steps", "5", "--epochs", "9"), 5), ("prt", (), 6),
    ("pretrain", ("--epochs", "2"), None), ("pretrain", ("--steps", "5", "--epochs", "2"), 5)])
def test_epochs_count_unless_steps_are_given(tmp_path, monkeypatch, method, options, steps):
    """They replace the number of steps of a recipe, too."""
    begun = []
    monkeypatch.setattr(prt, "fit", lambda policy, indices, fetch, **given: begun.append(given["steps"]))
    assert call(*start(method), "--batch", 8, "--method", method, *options, "--out", tmp_path / "x.pt") == 0
    assert begun == [steps] if steps else begun[0] < 50


def test_only_answers_are_learned(tmp_path, monkeypatch):
    """Catches: Prompts are in the loss, on train_lm.py's way from the file to the targets of a step."""
    seen, fit = [], prt.fit

    def spy(policy, indices, fetch, **options):
        for (_, _), targets, base_logits in (fetch(torch.tensor([i]), None) for i in range(len(SUMS))):
            assert base_logits is None
            seen.append(targets.tolist())
        return fit(policy, indices, fetch, **options)

    monkeypatch.setattr(prt, "fit", spy)
    assert call(*TUNE_LM, "--data", "talk.jsonl", "--steps", 1, "--out", tmp_path / "x.pt") == 0
    tokenizer = Tokenizer(read(OLD)["tokenizer"], "old")
    assert [tokenizer.decode(ids) for ids in seen] == [
        f"Well …<|endoftext|>{eval(s)}.<|endoftext|>" for s in SUMS]


def test_a_reward_may_start_from_another_model_than_its_base(tmp_path, table):
    """Catches: It starts from the base all the same, or forgets which base it was trained on."""
    out = tmp_path / "init.pt"
    assert call(*TUNE_LM, "--reward-init", NEW, "--steps", 1, "--lr", 1e-9, "--out", out) == 0
    checkpoint = read(out)
    assert checkpoint["source"] == OLD and checkpoint["method"] == "prt"
    assert checkpoint["arch"]["width"] == read(NEW)["arch"]["width"] != read(OLD)["arch"]["width"]
    assert same(out, NEW, atol=1e-7)
    assert [row["method"] for row in table(*EVAL_LM, "--reward", out, "--data", "sums.jsonl")] == [
        "base alone", "base + reward (PRT)", "source alone", "source + reward"]


def test_a_llama_with_its_sentencepiece_tokenizer_is_tuned_resumed_and_asked(tmp_path, capsys, table):
    """Catches: One of the scripts cannot use the tokenizer, or answers lose the spaces between words."""
    base, whole, resumed = FIXTURES / "stories260k", tmp_path / "whole.pt", tmp_path / "resumed.pt"
    command = (*TRAIN_LM, "--base", base, "--data", "talk.jsonl", "--steps", 2, "--batch", 4, "--lr", 1e-9)
    assert call(*command, "--out", whole) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*command, "--out", resumed)
    assert call(*command, "--out", resumed, "--resume") == 0
    assert same(whole, resumed)
    command = ("eval.py", "--reward", whole, "--base", base, "--device", "cpu", "--beta", 1e9)
    capsys.readouterr()
    for options in ((), ("--speculative",)):
        assert call(*command, "--prompt", "Once upon a time,", "--new-tokens", 32, *options) == 0
        alone, tilted = capsys.readouterr().out.strip().split("\n\nbase + reward (PRT):")
        assert alone == f"base alone:{tilted}"  # a reward of almost no weight
        assert re.search("[a-z] [a-z]+ [a-z]", tilted)
    assert len(table(*command, "--data", "talk.jsonl", "--new-tokens", 8)) == 4


def test_an_epoch_is_of_the_examples_that_are_not_held_out(tmp_path):
    """Catches: With --hold-out 0.5, two epochs are four passes over what is left."""
    command = (*TUNE_LM, "--data", "sums.jsonl", "--epochs", 1, "--hold-out", 0.5)
    assert call(*command, "--out", tmp_path / "half.pt") == 0
    assert read(tmp_path / "half.pt")["step"] == 2  # 12 of 24 examples, 8 in a batch


def test_recompute_and_chunk_change_memory_and_not_the_weights(tmp_path, monkeypatch):
    sizes, calls, head, forward = [], [], GPT.head, Block.forward
    monkeypatch.setattr(GPT, "head", lambda self, x: sizes.append(len(x)) or head(self, x))
    monkeypatch.setattr(Block, "forward", lambda self, *x: calls.append(x) or forward(self, *x))
    plain, recompute, chunk = (tmp_path / f"{name}.pt" for name in ("plain", "recompute", "chunk"))
    blocks, largest = {}, {}
    for out, options in {plain: (), recompute: ["--recompute"], chunk: ["--chunk", 7]}.items():
        sizes.clear()
        calls.clear()
        assert call(*TUNE_LM, "--steps", 4, *options, "--out", out) == 0
        blocks[out], largest[out] = len(calls), max(sizes)
    assert largest[plain] > 20 and largest[chunk] == 7
    assert blocks[chunk] == blocks[plain] < blocks[recompute]
    assert same(plain, recompute, atol=1e-5) and same(plain, chunk, atol=1e-5)
    assert not same(plain, OLD, atol=1e-3)


# The scores that a run prints at its end

def test_a_run_on_a_folder_without_a_test_split_succeeds(tmp_path):
    """Catches: A run that is trained and saved fails because there is nothing to score it on."""
    (tmp_path / "data").mkdir()
    shutil.copy("sums.jsonl", tmp_path / "data/train.jsonl")
    assert call(*TUNE_LM, "--data", tmp_path / "data", "--steps", 2, "--out", tmp_path / "x.pt") == 0
    assert read(tmp_path / "x.pt")["step"] == 2


def test_a_run_scores_on_the_test_split_what_eval_scores(tmp_path, capsys, table):
    """It scores the base and the reward on it, or the base and itself, or itself alone."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        shutil.copy("sums.jsonl", tmp_path / f"data/{split}.jsonl")
    out, nll = {method: f"{tmp_path}/{method}.pt" for method in ("prt", "ft", "pretrain")}, {}
    for method in out:
        assert call(*start(method), "--data", tmp_path / "data", "--steps", 2, "--method", method,
                    "--out", out[method]) == 0
        nll[method] = dict(re.findall(r"^(\S+): NLL ([\d.]+) per token", capsys.readouterr().out, re.M))
    assert [[*names] for names in nll.values()] == [[OLD, out["prt"]], [OLD, out["ft"]], [out["pretrain"]]]
    rows = table(*EVAL_LM, "--reward", out["prt"], "--base", OLD, "--tuned", out["ft"])
    rows = {row["method"]: f"{row['nll']:.3f}" for row in rows}
    assert nll["prt"] == {OLD: rows["base alone"], out["prt"]: rows["base + reward (PRT)"]}
    assert nll["ft"] == {OLD: rows["base alone"], out["ft"]: rows["source fine-tuned"]}
    assert rows["source fine-tuned"] == rows["base + EFT"] != rows["base + reward (PRT)"]


# Two processes

@pytest.fixture(scope="module")
def twice(texts, tmp_path_factory):
    """A run by two processes, and one that stops after its eighth step: their folder and command line."""
    folder = tmp_path_factory.mktemp("twice")
    # Examples of the same length that have different numbers of targets.
    rows = [dict(prompt=" 3 +" * (20 - n), response=f" {n} x" * n) for n in [1, 19] * 12]
    (folder / "uneven.jsonl").write_text(jsonl(rows))
    command = (*TUNE_LM[1:], "--data", str(folder / "uneven.jsonl"), "--steps", "12", "--warmup", "2",
               "--recompute", "--chunk", "7")
    commands = [(*command, "--out", str(folder / f"{name}.pt")) for name in ("two", "half")]
    two_processes("train_lm", commands, 8, folder, cwd=texts.folder)
    return folder, command


def test_two_processes_equal_one(twice, tmp_path):
    """Catches: Sharded weights are saved in parts, or gradients averaged over processes, not targets."""
    folder, command = twice
    assert call("train_lm.py", *command, "--accum", 2, "--out", tmp_path / "one.pt") == 0
    assert same(tmp_path / "one.pt", folder / "two.pt", atol=1e-5)
    assert not same(tmp_path / "one.pt", OLD, atol=1e-3)


def test_one_process_resumes_a_run_of_two(twice, tmp_path):
    """Catches: One process cannot continue an unfinished run of two."""
    folder, command = twice
    half = tmp_path / "half.pt"
    half.write_bytes((folder / "half.pt").read_bytes())
    assert read(half)["step"] == 6 and not same(half, folder / "two.pt", atol=1e-4)
    assert call("train_lm.py", *command, "--out", half, "--resume") == 0
    assert read(half)["step"] == 12 and "optimizer" not in read(half)
    assert same(half, folder / "two.pt", atol=1e-5)


# Resumed runs

@pytest.mark.parametrize("options", [(), ("--method", "ft", "--recompute"), ("--method", "pretrain")])
def test_an_interrupted_command_resumes_bit_for_bit(texts, tmp_path, monkeypatch, options):
    """Catches: --resume leaves other weights than the run that was never stopped."""
    command = (*TUNE_LM, *options, "--steps", 7, "--warmup", 2, "--out")
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    assert call(*command, whole) == 0
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*command, half)
    assert read(half)["step"] == 1 and not same(whole, half, atol=1e-4)
    assert call(*command, half, "--resume") == 0
    assert same(whole, half) and read(half)["step"] == 7 and "optimizer" not in read(half)


# Bad input

TUNE = ("train_lm.py --base {old} --data {data} --steps 2 --batch 8 --accum 1 --length 64 --device cpu "
        "--out {out}/x.pt ")
CASES = {
    "unknown data": (TUNE + "--data sumz", "--data sumz", "arithmetic, gsm8k"),
    "malformed line": (TUNE + "--data {root}/bad.jsonl", "{root}/bad.jsonl line 2"),
    "empty file": (TUNE + "--data {root}/empty.jsonl", "{root}/empty.jsonl"),
    "not UTF-8": (TUNE + "--data {root}/latin.jsonl", "{root}/latin.jsonl"),
    "no tokenizer": (TUNE + "--base {bare}", "{bare}", "tokenizer.json"),
    "no tokenizer of the reward": (TUNE + "--reward-init {bare}", "{bare}", "tokenizer.json"),
    "other tokenizer": (TUNE + "--reward-init {root}/llama", "{root}/llama", "{old}", "550 tokens", "400 ("),
    "larger tokenizer than the matrix": (TUNE + "--base {root}/short", "{root}/short", "512", "550 tokens"),
    "no end token": (TUNE + "--base {root}/endless", "{root}/endless", "eos_token_id"),
    "image base": (TUNE + "--base {clip}", "{clip} is a base for images", "text"),
    "image model as reward's start": (TUNE + "--reward-init {clip}", "{clip} is a base for images", "text"),
    "reward as base": (TUNE + "--base {reward}", "{reward} is a reward"),
    "tuned as base": (TUNE + "--base {tuned}", "{tuned} is a fine-tuned"),
    "no such base": (TUNE + "--base {out}/none.pt", "{out}/none.pt"),
    "no response within length": (TUNE + "--length 2", "24 examples", "--length 2"),
    "text below length": (TUNE + "--method pretrain --length 200000", "--length 200000"),
    "longer than the positions": (TUNE + "--data {root}/long.jsonl --length 1024", "256", "--length"),
    "out exists": (TUNE + "--out {reward}", "{reward} exists", "--resume"),
    "resume without file": (TUNE + "--resume", "--resume", "{out}/x.pt"),
    "resume of a finished run": (TUNE + "--resume --out {reward}", "{reward}", "step: 3"),
    "resume with another length": (TUNE + "--resume --out {half} --length 63", "{half}", "--length"),
    "resume with another start": (TUNE + "--resume --out {half} --reward-init {new}", "--reward-init"),
    "default run over another program's file": ("train_lm.py --out {root}/demo", "{root}/demo/old.pt",
                                                "--out"),
    "uneven batch": (TUNE + "--accum 3", "8", "3"),
    "warmup": (TUNE + "--warmup 2", "--warmup"),
    "no chunk": (TUNE + "--chunk 0", "--chunk"),
    "no length": (TUNE + "--length 0", "--length"),
    "no epochs": (TUNE + "--epochs 0", "--epochs"),
    "unknown size": (TUNE + "--size huge", "--size"),
}


@pytest.fixture
def names(malformed, tmp_path):
    (tmp_path / "out").mkdir()
    return malformed | dict(out=tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_and_touches_no_file(texts, names, capfd, monkeypatch, case):
    """Catches: A traceback, an error that does not name the file or flag, or files written before it."""
    if "{half}" in CASES[case][0]:
        names |= dict(half=names["out"] / "half.pt")
        with monkeypatch.context() as patch:
            interrupt(patch)
            with pytest.raises(KeyboardInterrupt):
                call(*TUNE.format(**names).split(), "--out", names["half"])
    assert_refused(CASES[case], names, capfd, names["out"], names["root"], texts.folder)


def test_the_refused_command_line_runs_without_its_fault(texts, names, capfd):
    """Catches: The command lines above fail for another reason than their own."""
    command = TUNE.format(**names).split()
    assert call(*command) == 0
    assert call(*command, "--base", names["root"] / "llama", "--out", names["out"] / "y.pt") == 0
    assert capfd.readouterr().err == ""
    assert sorted(f.name for f in contents(names["out"])) == ["x.pt", "y.pt"]
