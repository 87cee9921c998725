"""eval.py on images and text: tables, pictures, answers, --run, and bad input."""
import contextlib
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EVAL,
    EVAL_LM,
    NEW,
    OLD,
    ORACLE,
    REWARD,
    ROOT,
    TUNE_LM,
    TUNED,
    assert_refused,
    call,
    contents,
    eval_script,
    jsonl,
    one_line,
    output,
    read,
)
from PIL import Image

import prt
from data import files, images, text
from eval import COLUMNS
from models import decode, runs, weights
from models.clip import classifier
from models.tokenizer import Tokenizer

METHODS = ["base alone", "base + reward (PRT)", "source alone", "source + reward", "source fine-tuned",
           "base + EFT", "base fine-tuned"]
TWO_BETAS = [*METHODS[:2], *METHODS[1:6], *METHODS[5:]]
RUN = "out/shapes-0"
RUN_LM = ("eval.py", "--run", "out/arithmetic-0", "--limit", 2, "--new-tokens", 4, "--device", "cpu")


def without_times(printed):
    """Returns the lines of a table without what is measured, which are the last columns."""
    lines = printed.splitlines()
    header = next(line for line in lines if line.lstrip().startswith("beta"))
    title = next(COLUMNS[name][0] for name in ("ms", "speed") if COLUMNS[name][0] in header)
    end = header.index(title) + len(title) - 10
    return [line[:end] if re.match("base|source| +beta", line) else line for line in lines]


# Tables of images

@pytest.fixture(scope="module")
def image_report(shapes, tmp_path_factory):
    """The table of --run with two betas, by a process of its own: what it writes to --json, and prints."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    printed = output("eval.py", "--run", RUN, "--beta", 0.5, 1, "--json", file, "--device", "cpu",
                     cwd=shapes.folder, cache=shapes.cache)
    return json.loads(file.read_text()), printed


def test_the_table_of_images_has_a_row_for_each_way_to_use_the_models(image_report):
    about, printed = image_report
    assert [row["method"] for row in about["rows"]] == TWO_BETAS
    assert [row["beta"] for row in about["rows"]] == [None, 0.5, 1, None, 1, None, 0.5, 1, None]
    assert about["data"] == "shapes" and about["images"] == 64 and about["base"] == f"{RUN}/new.pt"
    for row in about["rows"]:
        assert row["method"] in printed and f"{row['top1']:.2%}" in printed
        assert row["ms"] > 0


def test_a_smaller_beta_moves_the_images_base_farther(image_report):
    rows = image_report[0]["rows"]
    assert rows[0]["kl"] < 1e-6 and rows[1]["kl"] > rows[2]["kl"] > 0


def test_several_rewards_for_images_add_up(in_shapes, image_report, table):
    """The sum of a reward with itself is that reward at half its beta."""
    reward, half = f"{RUN}/reward.pt", image_report[0]["rows"][1]
    rows = table("eval.py", "--reward", reward, reward, "--base", f"{RUN}/new.pt", "--device", "cpu")
    total = next(row for row in rows if row["method"] == "base + sum of rewards")
    assert abs(total["nll"] - half["nll"]) < 1e-5 and abs(total["kl"] - half["kl"]) < 1e-5


# Beta chosen on held-out data

@pytest.fixture(scope="module")
def held_out(tiny, tmp_path_factory):
    """Paths of a reward and a fine-tuned model for images, of beta 2, that left out 40% of the images."""
    root = tmp_path_factory.mktemp("held-out")
    train = ["train_vision.py", "--data", tiny.data, "--base", tiny.old, "--steps", 8, "--batch", 4,
             "--lr", 1e-2, "--warmup", 0, "--hold-out", 0.4, "--beta", 2, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CACHE", tiny.root / "cache")
        for method in ("prt", "ft"):
            assert call(*train, "--method", method, "--out", root / f"{method}.pt") == 0
    return SimpleNamespace(reward=root / "prt.pt", tuned=root / "ft.pt")


@torch.no_grad()
@pytest.mark.parametrize("betas", [(0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (8.0, 1 / 64)])
def test_beta_auto_is_the_best_on_held_out_images(tiny, held_out, report, monkeypatch, betas):
    """Catches: beta is chosen on the test split, or on images that the reward was trained on."""
    monkeypatch.setattr(files, "CACHE", tiny.root / "cache")
    monkeypatch.setattr(eval_script, "BETAS", betas)
    about = report("eval.py", "--reward", held_out.reward, "--base", tiny.new, "--tuned", held_out.tuned,
                   "--beta", 1, "auto", "--device", "cpu")
    assert about["beta chosen by"] == "top-1 of the 40% of training data held out"
    rows = about["rows"]
    train, test = (images.load(str(tiny.data), split, 32) for split in ("train", "test"))
    _, i = runs.hold_out(len(train.labels), 0.4)
    assert len(i) == 3
    pixels, labels = torch.cat([train.images[i], test.images]), train.labels[i]
    prompts = images.prompts(train.classes, train.templates)
    base, ref = (classifier(weights.load(path), prompts)(pixels) for path in (tiny.new, tiny.old))
    reward, tuned = (weights.load(path)(pixels) for path in (held_out.reward, held_out.tuned))
    for name, r in {"base + reward (PRT)": prt.reward(reward, beta=2),
                    "base + EFT": prt.reward(tuned, ref, beta=2)}.items():
        def quality(beta, r=r):
            log_probs = prt.tilt(base, r, beta)[:3]
            return runs.accuracy(log_probs, labels), -F.nll_loss(log_probs, labels)
        nll, = (row["nll"] for row in rows if row["method"] == name and row["beta"] == 1)
        assert nll == pytest.approx(F.nll_loss(prt.tilt(base, r)[3:], test.labels).item(), rel=1e-5)
        assert [row["beta"] for row in rows if row["method"] == f"{name}, beta chosen"] == [
            max(betas, key=quality)]


def test_without_a_beta_a_row_has_that_of_its_training(tiny, held_out, table, monkeypatch):
    """Catches: The source base is added to the tuned model instead of subtracted."""
    monkeypatch.setattr(files, "CACHE", tiny.root / "cache")
    command = ("eval.py", "--reward", held_out.reward, "--base", tiny.new, "--tuned", held_out.tuned,
               "--device", "cpu")
    figures = [[(row["method"], row["beta"], row["nll"]) for row in table(*command, *options)]
               for options in ((), ("--beta", 2))]
    assert figures[0] == figures[1]


def test_beta_auto_scores_the_held_out_images_only(tiny, held_out, tmp_path, monkeypatch):
    """Catches: beta is chosen on the images that were trained on, which may give the same beta.

    --data has no training split here: the held-out images are of the reward's data.
    """
    shutil.copytree(tiny.data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "train")
    monkeypatch.setattr(files, "CACHE", tiny.root / "cache")
    seen, predict = [], runs.predict
    monkeypatch.setattr(runs, "predict", lambda model, x, batch: seen.append(x) or predict(model, x, batch))
    command = ("eval.py", "--reward", held_out.reward, "--base", tiny.new, "--beta", "auto")
    assert call(*command, "--data", tmp_path / "data", "--device", "cpu") == 0
    train, test = (images.load(str(tiny.data), split, 32) for split in ("train", "test"))
    chosen_on = train.images[runs.hold_out(len(train.labels), 0.4)[1]]
    assert not torch.equal(chosen_on, test.images)
    assert [torch.equal(x, chosen_on) for x in seen[:2]] == [True, True]
    assert all(torch.equal(x, test.images) for x in seen[2:])


def test_every_beta_has_a_row_of_eft(shapes, image_report):
    """At the beta of its training, 1 here, EFT adds the log-ratio of two networks; at 0.5, twice of it."""
    rows = {row["beta"]: row for row in image_report[0]["rows"] if row["method"] == "base + EFT"}
    assert rows.keys() == {0.5, 1}
    assert rows[0.5]["kl"] > rows[1]["kl"] > 0


def test_beta_auto_is_the_best_on_held_out_problems(in_texts, tmp_path, table, monkeypatch):
    """Catches: Other problems are used than those that training left out, or the worst beta is chosen."""
    path = tmp_path / "held-out.pt"
    command = (*TUNE_LM, "--data", "sums.jsonl", "--hold-out", 0.25, "--steps", 4, "--lr", 3e-2)
    assert call(*command, "--out", path) == 0
    seen, batches = [], eval_script.batches
    monkeypatch.setattr(eval_script, "batches", lambda data, i, n: seen.append(i) or batches(data, i, n))
    rows = table(*EVAL_LM, "--reward", path, "--data", "sums.jsonl", "--beta", "auto", "--limit", 4)
    examples = text.load("sums.jsonl", "train")[1]
    tokenizer, end = Tokenizer(read(OLD)["tokenizer"], "old"), read(OLD)["arch"]["end"]
    data = text.encode(examples, tokenizer, end, 1024)
    _, held = runs.hold_out(len(examples), 0.25)
    assert len(held) == 6 and seen[0].equal(held[:4])
    base, reward = weights.load(NEW), weights.load(path)
    batch = [text.collate(data, held[:4])]
    nll = {beta: runs.score_texts(base, [(1 / beta, reward)], batch)["nll"] for beta in eval_script.BETAS}
    row, = (row for row in rows if row["method"] == "base + reward (PRT), beta chosen")
    assert row["beta"] == min(nll, key=nll.get)
    assert len(set(nll.values())) == len(nll)


def test_held_out_problems_are_cut_and_dropped_as_in_training(in_texts, tmp_path, monkeypatch):
    """Catches: With another --length or --drop, other problems have the numbers of those left out."""
    path, calls, encode = tmp_path / "cut.pt", [], text.encode
    assert call(*TUNE_LM, "--data", "sums.jsonl", "--hold-out", 0.25, "--steps", 1, "--warmup", 0, "--drop",
                "--length", 13, "--out", path) == 0
    monkeypatch.setattr(text, "encode", lambda examples, tokenizer, end, *rest: (
        calls.append(rest), encode(examples, tokenizer, end, *rest))[1])
    assert call(*EVAL_LM, "--reward", path, "--data", "sums.jsonl", "--beta", "auto", "--limit", 4) == 0
    assert (13, True) in calls


def test_beta_auto_is_refused_where_training_left_nothing_out(tiny, held_out, tmp_path, monkeypatch, capfd):
    """Catches: beta is chosen on examples that the reward has learned by heart."""
    monkeypatch.setattr(files, "CACHE", tiny.root / "cache")
    older = tmp_path / "older.pt"  # without the arguments of its training
    files.save(older, {k: v for k, v in read(tiny.reward).items() if k != "args"})
    other = tmp_path / "other.pt"
    files.save(other, read(held_out.reward) | dict(data="other"))
    command = ("eval.py", "--base", tiny.new, "--beta", "auto", "--device", "cpu", "--reward")
    capfd.readouterr()
    one_line(call(*command, held_out.reward, other), capfd.readouterr().err, "auto", other, "same data")
    for options, name in (([tiny.reward], tiny.reward), ([held_out.reward, "--tuned", tiny.ft], tiny.ft),
                          ([held_out.reward, tiny.reward], tiny.reward), ([older], older)):
        capfd.readouterr()
        one_line(call(*command, *options), capfd.readouterr().err, "--beta auto", name, "--hold-out 0")


# The distance of the bases

@torch.no_grad()
def test_the_kl_between_the_bases_is_below_the_table_of_images(in_shapes, report, capsys):
    """Catches: The direction of the KL is reversed, or another model is compared."""
    about = report("eval.py", "--run", RUN, "--device", "cpu")
    data = images.load("shapes", "test", 32)
    prompts = images.prompts(data.classes, data.templates)
    old, new = (classifier(weights.load(f"{RUN}/{name}.pt"), prompts)(data.images) for name in ("old", "new"))
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    expected = F.kl_div(new, old, log_target=True, reduction="batchmean").item()
    assert about["kl_of_bases"] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(prt.kl(new, old).mean().item(), rel=1e-2)
    assert f"KL(source base || base): {expected:.4f} nats" in capsys.readouterr().out.splitlines()[-2]


def test_the_kl_between_the_bases_is_below_the_table_of_text(in_texts, report, capsys):
    about = report(*EVAL_LM, "--limit", 8)
    data = text.encode(text.load("arithmetic", "test")[1][:8], Tokenizer(read(OLD)["tokenizer"], "old"),
                       read(OLD)["arch"]["end"], 256)
    inputs, targets = text.collate(data, torch.arange(8))
    with torch.no_grad():
        old, new = (F.log_softmax(model.head(model(*inputs)), -1) for model in map(weights.load, (OLD, NEW)))
    expected = F.kl_div(new, old, log_target=True, reduction="batchmean").item()
    assert about["kl_of_bases"] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(prt.kl(new, old).mean().item(), rel=1e-3)
    assert f"KL(source base || base): {about['kl_of_bases']:.4f} nats" in capsys.readouterr().out
    assert report(*EVAL_LM, "--limit", 8, "--base", OLD)["kl_of_bases"] == pytest.approx(0, abs=1e-6)


# Tables of text

@pytest.fixture(scope="module")
def text_report(texts, tmp_path_factory):
    """The table of --run with two betas, by a process of its own: what it writes to --json, and prints."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    printed = output("eval.py", "--run", "out/arithmetic-0", "--beta", 0.5, 1, "--limit", 8,
                     "--new-tokens", 8, "--json", file, "--device", "cpu", cwd=texts.folder)
    return json.loads(file.read_text()), printed


def test_the_table_of_text_has_a_row_for_each_way_to_use_the_models(text_report):
    about, printed = text_report
    assert [(row["method"], row["beta"]) for row in about["rows"]] == list(
        zip(TWO_BETAS, (None, 0.5, 1, None, 1, None, 0.5, 1, None)))
    assert about["examples"] == 8 and about["base"] == NEW and about["rewards"] == [REWARD]
    for row in about["rows"]:
        assert row["nll"] > 0 and row["speed"] > 0
        assert all(0 <= row[key] <= 1 for key in ("form", "exact", "error", "accuracy"))
        assert re.search(rf"^{re.escape(row['method'])} .*{row['nll']:.3f}", printed, re.M)


def test_a_smaller_beta_moves_the_text_base_farther(text_report):
    rows = text_report[0]["rows"]
    assert rows[0]["kl"] == rows[3]["kl"] == 0 and rows[1]["kl"] > rows[2]["kl"] > 0


def test_fine_tuned_models_have_a_divergence_from_the_base_of_their_row(in_texts, table):
    rows = {row["method"]: row for row in table(*EVAL_LM, "--tuned", TUNED, "--oracle", TUNED, "--limit", 8)}
    assert rows["source fine-tuned"]["kl"] > 0.01 and rows["base fine-tuned"]["kl"] > 0.01
    assert rows["source fine-tuned"]["nll"] == pytest.approx(rows["base fine-tuned"]["nll"], abs=1e-4)


def test_several_rewards_for_text_add_up(in_texts, table):
    """The sum of a reward with itself is that reward at half its beta."""
    command = (*EVAL_LM, "--limit", 8)
    rows = table(*command, "--reward", REWARD, REWARD)
    assert [row["method"] for row in rows] == ["base alone", *[f"base + {REWARD} (PRT)"] * 2,
                                               "base + sum of rewards", "source alone", "source + reward"]
    half = table(*command, "--beta", 0.5)[1]
    assert abs(rows[3]["nll"] - half["nll"]) < 1e-5 and abs(rows[3]["kl"] - half["kl"]) < 1e-5
    assert rows[1]["nll"] == rows[2]["nll"] != rows[3]["nll"]


def test_limit_takes_the_first_examples(in_texts, report):
    """The file need not be the one that the reward was trained on."""
    five, whole = (report(*EVAL_LM, "--data", "sums.jsonl", *limit) for limit in (["--limit", 5], []))
    assert five["examples"] == 5 and five["data"] == "sums.jsonl"
    assert whole["rows"][0]["nll"] != five["rows"][0]["nll"] and len(whole["rows"]) == len(five["rows"])


def test_the_table_has_a_column_for_memory_on_cuda_only(image_report, text_report):
    for about, printed in (image_report, text_report):
        assert about["device"].startswith("CPU")
        assert all(row["mib"] is None for row in about["rows"])
        assert "MiB" not in printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_table_says_how_much_memory_cuda_takes(in_texts, table, capsys):
    rows = table(*EVAL_LM, "--device", "cuda", "--limit", 8)
    assert all(row["mib"] > 0 for row in rows)
    assert "MiB" in capsys.readouterr().out


# --run

@pytest.mark.parametrize("kind", ["shapes", "texts"])
def test_the_printed_command_prints_the_table_of_the_long_one(kind, request, monkeypatch, capsys):
    """Catches: Answers of --new-tokens' default length do not fit into the positions of the text models."""
    folder, command = request.getfixturevalue(f"in_{kind}"), request.getfixturevalue(kind).printed
    monkeypatch.setitem(text.COUNTS, "test", 4)
    command = command.splitlines()[-1].split()[1:]
    assert call(*command) == 0
    short = without_times(capsys.readouterr().out)
    run = command[-1]
    assert call("eval.py", "--reward", f"{run}/reward.pt", "--base", f"{run}/new.pt", "--tuned",
                f"{run}/tuned.pt", "--ref", f"{run}/old.pt", "--oracle", f"{run}/oracle.pt",
                *(["--picture", folder.folder / "again.png"] if kind == "shapes" else [])) == 0
    long = without_times(capsys.readouterr().out)
    assert [line.split("  ")[0] for line in short[3:10]] == METHODS
    assert short[:10] == long[:10]


def test_run_draws_the_picture_of_images(shapes, image_report):
    with Image.open(shapes.folder / RUN / "picture.png") as picture:
        assert picture.size == (960, 600)
    assert f"\n{RUN}/picture.png: " in image_report[1]


def test_run_writes_nothing_for_text(in_texts):
    before = contents(in_texts.folder)
    assert call(*RUN_LM) == 0
    assert contents(in_texts.folder) == before


def test_flags_win_over_run(in_texts, report):
    plain, other = report(*RUN_LM), report(*RUN_LM, "--reward", REWARD, REWARD, "--base", OLD)
    assert (plain["base"], plain["rewards"]) == (NEW, [REWARD])
    assert (other["base"], other["rewards"]) == (OLD, [REWARD, REWARD])
    swapped = report(*RUN_LM, "--ref", NEW, "--tuned", ORACLE, "--oracle", TUNED)
    nll, other = ({row["method"]: row["nll"] for row in x["rows"]} for x in (plain, swapped))
    for method, instead in {"source alone": "base alone", "source fine-tuned": "base fine-tuned",
                            "base fine-tuned": "source fine-tuned", "base alone": "base alone"}.items():
        assert other[method] == pytest.approx(nll[instead], abs=1e-5)


def test_picture_wins_over_run(in_shapes, tmp_path):
    before = contents(in_shapes.folder)
    assert call("eval.py", "--run", RUN, "--picture", tmp_path / "x.png") == 0
    assert (tmp_path / "x.png").exists() and contents(in_shapes.folder) == before


@pytest.mark.parametrize("names, methods", [
    ("reward new", METHODS[:2]), ("reward new oracle", [*METHODS[:2], METHODS[6]]),
    ("reward new old", METHODS[:4]), ("reward new old tuned", METHODS[:6])])
def test_files_that_run_does_not_find_leave_rows_out(texts, tmp_path, monkeypatch, table, names, methods):
    (tmp_path / "run").mkdir()
    for name in names.split():
        shutil.copy(texts.folder / f"out/arithmetic-0/{name}.pt", tmp_path / "run")
    monkeypatch.chdir(tmp_path)  # where the source that the reward names is out of reach
    rows = table(*RUN_LM, "--run", "run")
    assert [row["method"] for row in rows] == methods


def test_run_without_a_source_takes_the_one_that_the_reward_names(texts, tmp_path, monkeypatch, table):
    for name in ("reward", "new"):
        shutil.copy(texts.folder / f"out/arithmetic-0/{name}.pt", tmp_path)
    monkeypatch.chdir(texts.folder)
    rows = table(*RUN_LM, "--run", tmp_path)
    assert [row["method"] for row in rows] == METHODS[:4]


@pytest.mark.parametrize("names", [[], ["new"], ["reward"]])
def test_run_refuses_a_folder_without_reward_and_base(texts, tmp_path, capfd, names):
    for name in names:
        shutil.copy(texts.folder / f"out/arithmetic-0/{name}.pt", tmp_path)
    before = contents(tmp_path)
    one_line(call("eval.py", "--run", tmp_path), capfd.readouterr().err, "--run", "reward.pt", "new.pt")
    assert contents(tmp_path) == before


# Answers to a prompt

COLORED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import eval
from models import runs
os.environ.pop("NO_COLOR", None)
runs.main(eval.main)
print("second", flush=True)
os.environ["NO_COLOR"] = "1"
runs.main(eval.main)
"""


def test_a_prompt_is_answered_in_color_on_a_terminal_only(in_texts, capsys):
    """If output is no terminal, or NO_COLOR is set, the same text has no escape codes."""
    command = (*EVAL_LM, "--prompt", "Tom has 3 apples and buys 4 more. How many?")
    assert call(*command) == 0
    plain = capsys.readouterr().out
    assert re.fullmatch(r"base alone:.*\n\nbase \+ reward \(PRT\):.*\n\n", plain, re.S)
    assert "\033" not in plain
    terminal, side = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", COLORED, *command[1:]], stdout=side,
                               stderr=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    os.close(side)
    printed = b""
    with contextlib.suppress(OSError):  # Linux, once the process has closed its side
        while part := os.read(terminal, 1000):
            printed += part
    os.close(terminal)
    assert process.wait() == 0
    colored, uncolored = printed.decode().replace("\r\n", "\n").split("second\n")
    assert uncolored == plain
    assert colored.count("\033[48;5;") == colored.count("\033[0m") > 0
    assert re.sub(r"\033\[[\d;]*m", "", colored) == plain


def test_a_prompt_is_asked_in_the_form_of_training(in_texts, tmp_path, monkeypatch, capsys):
    """The template of the reward's data is around it, and its answer ends at the end token."""
    tokenizer, asked = Tokenizer(read(OLD)["tokenizer"], "old"), []

    def answer(base, rewards, ids, *, end, **options):
        asked.append(tokenizer.decode(ids[0].tolist()))
        more = tokenizer.encode(" ü = 7") + [end] + tokenizer.encode(" unseen")
        return torch.cat([ids, torch.tensor([more])], 1)

    monkeypatch.setattr(prt, "generate", answer)
    assert call(*TUNE_LM, "--data", "talk.jsonl", "--steps", 1, "--out", tmp_path / "talk.pt") == 0
    capsys.readouterr()
    assert call(*EVAL_LM, "--reward", tmp_path / "talk.pt", "--prompt", "A {} b?") == 0
    assert asked == ["<|user|>\nA {} b?\n<|assistant|>\n"] * 2
    assert capsys.readouterr().out == "base alone: ü = 7\n\nbase + reward (PRT): ü = 7\n\n"


# Answers to test data

def test_answers_are_scored_by_their_first_number_in_form(in_texts, tmp_path, monkeypatch, table):
    """Catches: Answers in the order of lengths are compared with problems in the order of the file.

    Numbers may differ in their form alone; right numbers after the first one, or without the form, are wrong.
    """
    tokenizer, asked = Tokenizer(read(OLD)["tokenizer"], "old"), {}
    wanted = {"a": "1,000", "bb b b b": "-7", "c c": "12", "d": "5", "e e e": "0.50"}
    given = {"a": "#### 1000", "bb b b b": "so 3 ####-7.", "c c": "#### 13 #### 12", "d": "5",
             "e e e": "#### .5"}
    rows = [dict(prompt=prompt, response=f"{prompt} #### {answer}") for prompt, answer in wanted.items()]
    (tmp_path / "x.jsonl").write_text(jsonl(rows))

    def answer(base, rewards, ids, *, end, pad, **options):
        starts = [0] * len(ids) if pad is None else pad.tolist()
        prompts = [tokenizer.decode(row[start:].tolist()) for start, row in zip(starts, ids)]
        asked.update(dict.fromkeys(prompts))
        new = [tokenizer.encode(" " + given[prompt]) + [end] for prompt in prompts]
        width = max(map(len, new))
        return torch.cat([ids, torch.tensor([row + [end] * (width - len(row)) for row in new])], 1)

    monkeypatch.setattr(prt, "generate", answer)
    row = table(*EVAL_LM, "--data", tmp_path / "x.jsonl", "--batch", 3)[0]
    assert asked.keys() == wanted.keys()
    assert row["exact"] == 3 / 5 and row["form"] == 4 / 5
    assert row["error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


@pytest.fixture
def answers(in_texts, monkeypatch, table):
    """Runs eval.py on three problems; returns the answers in each row of the table, in ids."""
    generate, rows = eval_script.generate_answers, {}

    def record(args, device, row, *arguments):
        rows[row.method, row.beta] = generate(args, device, row, *arguments)
        return rows[row.method, row.beta]

    def run(*options):
        rows.clear()
        table(*EVAL_LM, "--limit", 3, *options)
        return dict(rows)

    monkeypatch.setattr(eval_script, "generate_answers", record)
    return run


def test_answers_do_not_depend_on_the_batch(answers):
    """Catches: Padding is attended to, or answers return in the order of lengths."""
    one = answers("--batch", 1)
    assert len({str(x) for row in one.values() for x in row}) > 3 and answers("--batch", 2) == one


def test_samples_are_reproducible(answers):
    """--temperature and --top-p draw the same answers for a seed, and others for another."""
    hot = ("--temperature", 1, "--top-p", 0.9)
    assert answers(*hot, "--seed", 1) == answers(*hot, "--seed", 1) != answers(*hot, "--seed", 2)
    greedy = answers()
    assert greedy == answers("--seed", 1) != answers(*hot, "--seed", 1)  # where the seed says nothing
    assert greedy == answers("--temperature", 1, "--top-p", 1e-9)


def test_speculative_decoding_gives_the_same_answers(answers):
    plain = answers()
    assert len(plain) == 4 and answers("--speculative") == plain


@pytest.fixture
def drafters(monkeypatch, table):
    """Runs eval.py with --speculative; returns the Models, and (base, rewards, drafter) of the rows."""
    load, decoded, models = eval_script.load_models, [], []

    def speculative(base, rewards, ids, *, drafter, temperature, top_p, generator, compile, **options):
        if rewards or drafter:
            decoded.append((base, rewards, drafter))
        return prt.generate(base, rewards, ids, **options)

    def run(*options):
        table(*EVAL_LM, "--limit", 2, "--speculative", *options)
        return models[0], decoded

    monkeypatch.setattr(decode, "speculative", speculative)
    monkeypatch.setattr(eval_script, "load_models", lambda *a: models.append(load(*a)) or models[-1])
    return run


def test_the_reward_drafts_with_its_source_for_the_base_that_it_is_added_to(in_texts, drafters):
    """Catches: The source drafts for itself or for EFT, or with a reward of another weight."""
    models, decoded = drafters("--tuned", TUNED, "--beta", 0.5, 1)
    (reward,), base, ref, tuned, _ = models
    two, one = [(2.0, reward)], [(1.0, reward)]
    assert decoded == [(base, two, (ref, two)), (base, one, (ref, one)), (ref, one, None),
                       (base, [(2.0, tuned), (-2.0, ref)], None), (base, [(1.0, tuned), (-1.0, ref)], None)]


def test_several_rewards_draft_together_with_their_source(in_texts, tmp_path, drafters):
    rewards = [shutil.copy(REWARD, tmp_path / f"{n}.pt") for n in (1, 2)]
    models, decoded = drafters("--reward", *rewards, "--beta", 1)
    a, b = ((1.0, reward) for reward in models.rewards)
    assert [drafter for _, _, drafter in decoded] == [
        (models.ref, [a]), (models.ref, [b]), (models.ref, [a, b]), None]


def test_the_reward_drafts_alone_if_its_source_is_not_found(texts, tmp_path, monkeypatch, drafters):
    for name in ("reward", "new"):
        shutil.copy(texts.folder / f"out/arithmetic-0/{name}.pt", tmp_path)
    monkeypatch.chdir(tmp_path)  # where the source that the reward names is out of reach
    models, decoded = drafters("--reward", "reward.pt", "--base", "new.pt", "--data", "arithmetic")
    assert models.ref is None
    assert decoded == [(models.base, [(1.0, models.rewards[0])], None)]


@pytest.mark.parametrize("options, seconds", [
    (["--compile"], [100, 2]), (["--compile", "--speculative"], [100, 2]), (["--speculative"], [2]),
    ([], [2]),
], ids=["compiled", "compiled and speculative", "speculative", "plain"])
def test_the_time_of_the_compiler_is_not_measured(in_texts, monkeypatch, table, options, seconds):
    """Catches: What is timed includes a compilation, or every text is generated twice without a need."""
    now, runs, generate = [0.0], [], prt.generate

    def answer(base, rewards, ids, *, length, end, pad, **rest):
        runs.append((base, tuple(rewards), ids.shape))
        now[0] += seconds[(len(runs) - 1) // 2 % len(seconds)] / 2  # a run has two batches
        return generate(base, rewards, ids, length=length, end=end, pad=pad)

    for module, name in ((prt, "generate"), (decode, "compiled"), (decode, "speculative")):
        monkeypatch.setattr(module, name, answer)
    monkeypatch.setattr(eval_script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = table(*EVAL_LM, "--limit", 5, "--batch", 3, *options)
    assert len(runs) == 2 * len(seconds) * len(rows)
    for i in range(0, len(runs), 2 * len(seconds)):  # all batches run before the first is timed
        assert len({(base, rewards) for base, rewards, _ in runs[i:i + 2 * len(seconds)]}) == 1
        assert runs[i:i + 2] == runs[i + 2 * len(seconds) - 2:i + 2 * len(seconds)]
    for row in rows:
        tokens = 2 * row["speed"]
        assert tokens == round(tokens) and 5 <= tokens <= 5 * 9


# Padded output matrices

def padded(source, path, rows):
    """Saves a model with more output rows than its tokenizer has tokens, and large ones; returns the path."""
    checkpoint = read(source)
    for key in ("embed_tokens.weight", "lm_head.weight"):
        x = checkpoint["model"][key]
        extra = torch.randn(rows - len(x), x.shape[1], generator=torch.Generator().manual_seed(0))
        checkpoint["model"][key] = torch.cat([x, 5 * extra])
    checkpoint["arch"]["vocab"] = rows
    torch.save(checkpoint, path)
    return path


def test_output_matrices_of_different_padding_give_the_table_of_unpadded_ones(in_texts, tmp_path, table,
                                                                             capsys):
    base, reward = padded(NEW, tmp_path / "new.pt", 640), padded(REWARD, tmp_path / "reward.pt", 600)
    plain = table(*EVAL_LM, "--limit", 4)
    mixed = table(*EVAL_LM, "--limit", 4, "--base", base, "--reward", reward)
    assert "cut to the tokenizer's 550" in capsys.readouterr().out
    for a, b in zip(plain, mixed):
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-4) and a["kl"] == pytest.approx(b["kl"], abs=1e-4)


def test_output_matrices_of_the_same_padding_give_the_table_of_unpadded_ones(in_texts, tmp_path, table):
    """Catches: A row without a token, which has no text, is chosen (the smaller Qwen2.5 have such rows)."""
    base, reward, ref = (padded(path, tmp_path / f"{i}.pt", 640) for i, path in enumerate((NEW, REWARD, OLD)))
    plain = table(*EVAL_LM, "--limit", 4)
    rows = table(*EVAL_LM, "--base", base, "--reward", reward, "--ref", ref, "--limit", 4)
    assert rows[0]["nll"] == pytest.approx(plain[0]["nll"], abs=1e-4)


def test_a_padded_reward_may_be_named_twice(in_texts, tmp_path, table):
    """Catches: One of the two models is not cut, or not on the device."""
    reward = padded(REWARD, tmp_path / "reward.pt", 640)
    rows = table(*EVAL_LM, "--reward", reward, reward, "--limit", 4)
    half = table(*EVAL_LM, "--beta", 0.5, "--limit", 4)
    assert rows[3]["nll"] == pytest.approx(half[1]["nll"], abs=1e-4)


# Bad input on images

IMAGES = {
    "no such reward": (EVAL + "--reward {none}/r.pt", "{none}/r.pt"),
    "base as reward": (EVAL + "--reward {old}", "{old} is a base"),
    "tuned as reward": (EVAL + "--reward {ft}", "{ft} is a fine-tuned"),
    "second reward is a base": (EVAL + "--reward {reward} {old}", "{old} is a base"),
    "reward as base": (EVAL + "--base {reward}", "{reward} is a reward"),
    "reward as tuned": (EVAL + "--tuned {reward}", "{reward} is a reward"),
    "base as oracle": (EVAL + "--oracle {new}", "{new} is a base"),
    "other classes": (EVAL + "--data {other}", "{reward}", "'red' and 'cyan'"),
    "damaged reward": (EVAL + "--reward {damaged}", "{damaged}"),
    "truncated reward": (EVAL + "--reward {cut}", "{cut}"),
    "truncated base": (EVAL + "--base {cut}", "{cut}"),
    "empty reward": (EVAL + "--reward {empty}", "{empty}"),
    "no such reference": (EVAL + "--ref {none}/old.pt", "{none}/old.pt"),
    "no such reference of the tuned": (EVAL + "--tuned {ft} --ref {none}/old.pt", "{none}/old.pt"),
    "zero strength": (EVAL + "--beta 1 0", "--beta"),
    "strength is no number": (EVAL + "--beta nan", "--beta"),
    "no batch": (EVAL + "--batch 0", "--batch"),
    "tasks of text": (EVAL + "--tasks gsm8k", "--tasks", "{reward}", "images"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_bad_input_on_images_is_refused_in_one_line_and_touches_no_file(paths, capfd, case):
    """Catches: A traceback, an error that does not name the file or flag, or files written before it."""
    assert_refused(IMAGES[case], paths, capfd, paths["out"], paths["root"])


def test_the_refused_command_line_on_images_runs_without_its_fault(paths, capfd):
    """Catches: The command lines above fail for another reason than their own."""
    assert call(*EVAL.format(**paths).split()) == 0
    assert sorted(f.name for f in contents(paths["out"])) == ["x.json", "x.png"]
    assert capfd.readouterr().err == ""


# Bad input on text

USE = "eval.py --reward {reward} --base {new} --new-tokens 8 --limit 4 --device cpu --json {out}/x.json "
TEXTS = {
    "unknown data": (USE + "--data sumz", "--data sumz", "arithmetic, gsm8k"),
    "malformed line": (USE + "--data {root}/bad.jsonl", "{root}/bad.jsonl line 2"),
    "empty file": (USE + "--data {root}/empty.jsonl", "{root}/empty.jsonl"),
    "numbers": (USE + "--data {root}/numbers.jsonl", "{root}/numbers.jsonl line 1"),
    "empty prompt": (USE + "--data {root}/unasked.jsonl", "{root}/unasked.jsonl"),
    "text file": (USE + "--data {book}", "{book}"),
    "pretraining data": (USE + "--data arithmetic-old", "arithmetic-old", "test split"),
    "no tokenizer": (USE + "--base {bare}", "{bare}", "tokenizer.json"),
    "other tokenizer": (USE + "--base {root}/llama", "{root}/llama", "{reward}", "550 tokens", "400 ("),
    "image base": (USE + "--base {clip}", "{clip} is a base for images", "text"),
    "image reward": (USE + "--reward {shapes}", "{new} is a base for text", "images"),
    "image reward as second": (USE + "--reward {reward} {shapes}", "{shapes}", "images"),
    "text reward as second": (USE + "--base {clip} --reward {shapes} {reward}", "{reward}", "images"),
    "reward as base": (USE + "--base {reward}", "{reward} is a reward"),
    "reward as reference": (USE + "--ref {reward}", "{reward} is a reward"),
    "base as reward": (USE + "--reward {old}", "{old} is a base"),
    "base as tuned": (USE + "--tuned {old}", "{old} is a base"),
    "no such reward": (USE + "--reward {out}/none.pt", "{out}/none.pt"),
    "no test data": (USE + "--reward {root}/file.pt", "sums.jsonl", "test split"),
    "long prompt": (USE + "--prompt " + "long" * 300, "256 positions", "--new-tokens"),
    "long answer": (USE + "--new-tokens 255", "255", "256 positions"),
    "no limit": (USE + "--limit 0", "--limit"),
    "zero top-p": (USE + "--top-p 0", "--top-p"),
    "negative temperature": (USE + "--temperature -1", "--temperature"),
    "temperature is no number": (USE + "--temperature nan", "--temperature"),
    "no new tokens": (USE + "--new-tokens 0", "--new-tokens"),
}


@pytest.fixture
def names(malformed, in_texts, tmp_path):
    (tmp_path / "out").mkdir()
    return malformed | dict(out=tmp_path / "out")


@pytest.mark.parametrize("case", TEXTS)
def test_bad_input_on_text_is_refused_in_one_line_and_touches_no_file(in_texts, names, capfd, case):
    """Catches: A traceback, an error that does not name the file or flag, or files written before it."""
    assert_refused(TEXTS[case], names, capfd, names["out"], names["root"], in_texts.folder)


def test_without_lm_eval_the_error_says_how_to_install_it(names, monkeypatch, capfd):
    """Catches: An ImportError and its traceback do not say what to install."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "models.harness", raising=False)
    monkeypatch.delattr("models.harness", raising=False)
    assert_refused((USE + "--tasks gsm8k", "--tasks", "pip install lm_eval"), names, capfd, names["out"])


def test_the_refused_command_line_on_text_runs_without_its_fault(names, capfd):
    """Catches: The command lines above fail for another reason than their own."""
    assert call(*USE.format(**names).split()) == 0
    assert call(*USE.format(**names).split(), "--prompt", "short") == 0
    assert capfd.readouterr().err == ""
    assert [f.name for f in contents(names["out"])] == ["x.json"]
