"""train_lm.py: the run without flags, methods on other files, and two processes."""
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    EVAL_LM,
    FIXTURES,
    NEW,
    OLD,
    REWARD,
    SUMS,
    TRAIN_LM,
    TUNE_LM,
    TUNED_BASE,
    TUNED_SOURCE,
    call,
    contents,
    interrupted,
    jsonl,
    one_line,
    processes,
    read,
    same,
)

import prt
from data import arithmetic
from data.tokenizer import Tokenizer
from models import examples, runs
from models.gpt import GPT, Block

pytestmark = pytest.mark.usefixtures("in_texts")


def start(method):
    """Returns the start of a command line: a method tunes the old base, or begins from nothing."""
    return (*TRAIN_LM, "--size", "old") if method == "pretrain" else TUNE_LM


DEFAULT = ("train_lm.py", "--steps", 3, "--batch", 8)
ROW = re.compile(r"^((?:base|source) .*?\d) +[\d.]+ +\d+$", re.M)  # up to the columns of time, the last two


def test_a_rerun_without_flags_trains_only_what_is_not_finished(texts, tmp_path, monkeypatch, capfd):
    """Catches: An unfinished model counts as finished; or a run with other flags takes one for its own."""
    shutil.copytree("out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arithmetic, "COUNTS", dict(old=1000, new=1000, train=200, test=50))
    monkeypatch.setattr(examples, "EVAL", texts.folder / "few_eval.py")
    Path(TUNED_SOURCE).unlink()
    before = contents(tmp_path / "out")
    interrupted(*DEFAULT)
    assert read(TUNED_SOURCE)["step"] == 1
    capfd.readouterr()
    for trained in ([("4", TUNED_SOURCE)], []):
        assert call(*DEFAULT) == 0
        printed = capfd.readouterr().out
        finished = re.findall(r"^(\S+) is finished", printed, re.M)
        assert finished == [path for path in (OLD, NEW, REWARD, TUNED_SOURCE, TUNED_BASE)
                            if path not in dict(trained).values()]
        assert re.findall(r"^run (\d) of 5: (\S+);", printed, re.M) == trained
        assert re.findall(r"^tuned_source (\d)/3", printed, re.M) == ["2", "3"] * len(trained)
        assert ROW.findall(printed) == ROW.findall(texts.printed) != []
    after = contents(tmp_path / "out")
    assert before.items() <= after.items() and same(TUNED_SOURCE, texts.folder / TUNED_SOURCE)
    one_line(call(*DEFAULT, "--steps", 4), capfd.readouterr().err, OLD, "--out")
    assert contents(tmp_path / "out") == after


@pytest.mark.parametrize("method, data", dict(prt="talk.jsonl", ft="book.txt", pretrain="book.txt").items())
def test_each_method_learns_from_a_file_and_says_what_eval_needs_to_know(tmp_path, capsys, method, data):
    out = tmp_path / "x.pt"
    assert call(*start(method), "--data", data, "--method", method, "--steps", 48, "--batch", 4, "--lr", 3e-3,
                "--out", out) == 0
    quarters = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(quarters) == 4 and sum(quarters[2:]) < 0.7 * sum(quarters[:2])
    checkpoint = read(out)
    assert checkpoint["data"] == data and checkpoint["kind"] == "gpt"
    assert checkpoint["template"] == ("<|user|>\n{}\n<|assistant|>\n" if data == "talk.jsonl" else "{}")
    assert [checkpoint.get(k) for k in ("method", "source", "beta")] == (
        [None] * 3 if method == "pretrain" else [method, OLD, 1.0])


@pytest.mark.parametrize("method, options, steps", [
    ("prt", ("--epochs", "2.5"), 8), ("ft", ("--steps", "5"), 5), ("prt", (), 6),
    ("pretrain", ("--steps", "5"), 5), ("prt", ("--epochs", "1", "--hold-out", "0.5"), 2)])
def test_epochs_are_of_the_examples_that_are_not_held_out(tmp_path, monkeypatch, method, options, steps):
    """Catches: With --hold-out 0.5, two epochs are four passes over what is left; --steps is ignored."""
    seen = []
    monkeypatch.setattr(prt, "fit", lambda policy, indices, fetch, **given: seen.extend(
        indices(step) for step in range(given["steps"])) or [dict(step=given["steps"])])
    command = (*start(method), "--data", "sums.jsonl", "--batch", 8, "--method", method, *options)
    assert call(*command, "--out", tmp_path / "x.pt") == 0
    assert len(seen) == steps
    if method != "pretrain":
        used, _ = runs.hold_out(len(SUMS), 0.5 if "--hold-out" in options else 0)
        assert set(torch.cat(seen).tolist()) == set(used.tolist())


def test_only_answers_are_learned(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(prt, "fit", lambda policy, indices, fetch, **options: seen.extend(
        fetch(torch.tensor([i]), None)[1].tolist() for i in range(len(SUMS))) or [dict(step=1)])
    assert call(*TUNE_LM, "--data", "talk.jsonl", "--steps", 1, "--out", tmp_path / "x.pt") == 0
    decode = Tokenizer(read(OLD)["tokenizer"], "old").decode
    assert [*map(decode, seen)] == [f"Well …<|endoftext|>{eval(s)}.<|endoftext|>" for s in SUMS]


def test_a_reward_may_start_from_another_model_than_its_base(tmp_path, table):
    out = tmp_path / "init.pt"
    assert call(*TUNE_LM, "--reward-init", NEW, "--steps", 1, "--lr", 1e-9, "--out", out) == 0
    checkpoint = read(out)
    assert checkpoint["source"] == OLD and checkpoint["method"] == "prt"
    assert checkpoint["arch"]["width"] == read(NEW)["arch"]["width"] != read(OLD)["arch"]["width"]
    assert same(out, NEW, atol=1e-7)
    assert [row["method"] for row in table(*EVAL_LM, "--reward", out, "--data", "sums.jsonl")] == [
        "base alone", "base + reward (PRT)", "source alone", "source + reward"]


def test_a_llama_with_its_sentencepiece_tokenizer_is_tuned_and_asked(tmp_path, capsys, table):
    base, out = FIXTURES / "stories260k", tmp_path / "x.pt"
    assert call(*TRAIN_LM, "--source", base, "--data", "talk.jsonl", "--steps", 2, "--batch", 4, "--lr", 1e-9,
                "--out", out) == 0
    command = ("eval.py", "--reward", out, "--base", base, "--device", "cpu", "--beta", 1e9)
    capsys.readouterr()
    for options in ((), ("--speculative",)):
        assert call(*command, "--prompt", "Once upon a time,", "--new-tokens", 32, *options) == 0
        alone, tilted = capsys.readouterr().out.strip().split("\n\nbase + reward (PRT):")
        assert alone == f"base alone:{tilted}"  # a reward of almost no weight
        assert re.search("[a-z] [a-z]+ [a-z]", tilted)
    assert len(table(*command, "--data", "talk.jsonl", "--new-tokens", 8)) == 4


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


def test_a_run_scores_on_the_test_split_what_eval_scores(tmp_path, capsys, table):
    (tmp_path / "data").mkdir()
    shutil.copy("sums.jsonl", tmp_path / "data/train.jsonl")
    assert call(*TUNE_LM, "--data", tmp_path / "data", "--steps", 1, "--out", tmp_path / "x.pt") == 0
    assert "NLL" not in capsys.readouterr().out
    shutil.copy("sums.jsonl", tmp_path / "data/test.jsonl")
    out, nll = {method: f"{tmp_path}/{method}.pt" for method in ("prt", "ft", "pretrain")}, {}
    for method in out:
        assert call(*start(method), "--data", tmp_path / "data", "--steps", 2, "--method", method,
                    "--out", out[method]) == 0
        nll[method] = dict(re.findall(r"^(\S+): NLL ([\d.]+) per token", capsys.readouterr().out, re.M))
    assert [[*names] for names in nll.values()] == [[OLD, out["prt"]], [OLD, out["ft"]], [out["pretrain"]]]
    rows = table(*EVAL_LM, "--reward", out["prt"], "--base", OLD, "--tuned-source", out["ft"])
    rows = {row["method"]: f"{row['nll']:.3f}" for row in rows}
    assert nll["prt"] == {OLD: rows["base alone"], out["prt"]: rows["base + reward (PRT)"]}
    assert nll["ft"] == {OLD: rows["base alone"], out["ft"]: rows["source fine-tuned"]}
    assert rows["source fine-tuned"] == rows["base + EFT"] != rows["base + reward (PRT)"]


def test_a_new_output_matrix_replaces_the_one_of_the_source_and_nothing_else(tmp_path):
    """Catches: The new matrix is the source's or depends on no seed, the body is new, too, or copy is not."""
    found = {}
    for init, seed in (("copy", 0), ("head", 0), ("head", 1)):
        flags = "--reward-init", init, "--seed", seed, "--steps", 1, "--lr", 1e-9, "--out"
        assert call(*TUNE_LM, *flags, tmp_path / f"{init}{seed}.pt") == 0
        found[init, seed] = read(tmp_path / f"{init}{seed}.pt")["model"]
    old = read(OLD)["model"]
    changed = [[name for name, x in model.items() if not torch.allclose(x, old[name], atol=1e-6)]
               for model in found.values()]
    assert changed == [[], ["lm_head.weight"], ["lm_head.weight"]]
    first, second = (found["head", seed]["lm_head.weight"] for seed in (0, 1))
    assert not torch.allclose(first, second, atol=0.01) and first.std() * 8 == pytest.approx(0.3, rel=0.02)


def test_two_processes_equal_one_which_resumes_their_run(texts, tmp_path):
    # Examples of the same length that have different numbers of targets.
    rows = [dict(prompt=" 3 +" * (20 - n), response=f" {n} x" * n) for n in [1, 19] * 12]
    (tmp_path / "uneven.jsonl").write_text(jsonl(rows))
    command = (*TUNE_LM[1:], "--data", str(tmp_path / "uneven.jsonl"), "--steps", "12", "--warmup", "2",
               "--recompute", "--chunk", "7", "--out")
    one, two, half, quick = (str(tmp_path / f"{name}.pt") for name in ("one", "two", "half", "compiled"))
    commands = [(*command, two), (*command, quick, "--compile", "--accum", "2"), (*command, half)]
    printed = processes(2, "train_lm", commands, 8, tmp_path, cwd=texts.folder)
    assert read(half)["step"] == 6 and not same(half, two, atol=1e-4)
    assert call("train_lm.py", *command, one, "--accum", 2) == 0
    assert call("train_lm.py", *command, half, "--resume") == 0
    assert same(one, two, atol=1e-5) and same(half, two, atol=1e-5) and not same(one, OLD, atol=1e-3)
    assert read(half)["step"] == 12 and "optimizer" not in read(half)
    # A graph for the blocks of each model, and another for other lengths; gradients are added up once a step.
    plain, fast = re.findall(r"^graphs (\d+) broken 0 syncs (.*)$", printed, re.M)
    assert plain == ("0", " ".join(["True"] * 12)) and fast[0] in ("2", "4")
    assert fast[1].removeprefix(plain[1] + " ") == " ".join(["False", "True"] * 12)
    assert same(one, quick, atol=1e-5)


def test_four_processes_train_and_score_as_one_and_two_resume_their_run(texts, tmp_path, capsys):
    """Catches: Processes gather the weights of two models in different orders, or score other texts."""
    shutil.copytree(texts.folder / "out", tmp_path / "out")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        shutil.copy("sums.jsonl", tmp_path / f"data/{split}.jsonl")
    command = (*TUNE_LM[1:], "--data", str(tmp_path / "data"), "--steps", "6", "--warmup", "0", "--out")
    one, four, half = (str(tmp_path / f"{name}.pt") for name in ("one", "four", "half"))
    where = dict(folder=tmp_path, cwd=texts.folder)
    printed = processes(4, "train_lm", [(*command, four), (*command, half)], 4, **where)
    assert read(half)["step"] == 4
    printed += processes(2, "train_lm", [(*command, half, "--resume", "--accum", "2"), (*command, "x.pt")], 0,
                         **where)
    assert call("train_lm.py", *command, one, "--accum", 4) == 0
    assert same(one, four, atol=1e-5) and same(one, half, atol=1e-5) and not same(one, OLD, atol=1e-3)
    scored = dict(re.findall(r"^(\S+): (NLL .*)$", printed + capsys.readouterr().out, re.M))
    assert scored[one] == scored[four] == scored[half] != scored[OLD]
