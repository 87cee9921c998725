"""The logs of runs, their held-out scores, and what is said of them (models/watch.py)."""
import json
from pathlib import Path
from types import SimpleNamespace

import figures
import pytest
import torch
from conftest import OLD, TUNE_LM, call, call_main, interrupted, one_line, read
from PIL import Image

import prt
from data import images, text
from data.tokenizer import Tokenizer
from models import held_out, runs, scores, watch, weights


def log(out):
    return [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]


def tune(tiny, out, *options):
    return call("train_vision.py", "--data", tiny.data, "--source", tiny.old, "--batch", 8, "--warmup", 0,
                "--out", out, *options)


@pytest.mark.parametrize("options", [(), ("--method", "ft"), ("--augment",), ("--lora", 2)], ids=str)
def test_the_log_of_a_run_on_images(tiny, tmp_path, capsys, options):
    """Catches: A held-out score is of trained images, of the reward alone, or of another save."""
    out = tmp_path / "x.pt"
    assert tune(tiny, out, "--steps", 8, "--lr", 1e-3, "--hold-out", 0.25, *options) == 0
    first, *rows = log(out)
    assert first["args"]["steps"] == first["steps"] == 8 and first["torch"] == torch.__version__
    assert first["device"].startswith("CPU (")
    steps = [row for row in rows if "loss" in row]
    saved = [row["step"] for row in rows if "held_out" in row]
    assert [row["step"] for row in steps] == saved == [2, 4, 6, 8]
    assert all(row.keys() == {"step", "loss", "accuracy", "norm", "kl", "per_second", "lr", "seconds"}
               for row in steps)
    assert steps[0]["lr"] > steps[-1]["lr"] > 0 and steps[0]["seconds"] <= steps[-1]["seconds"]
    model, data = weights.load(out), images.load(tiny.data, "train", 32)
    held = runs.hold_out(len(data.labels), 0.25)[1]
    assert first["images"] == f"{len(data.labels) - len(held)} of {len(data.labels)}"
    source = weights.load_base(tiny.old, model.info)
    with torch.no_grad():
        logits, base_logits = model(data.images[held]), source(data.images[held])
    tilted = prt.tilt(base_logits, prt.reward(logits, base_logits if "ft" in options else None))
    want = scores.classification(tilted, data.labels[held])
    found = rows[-1]["held_out"]
    assert found == pytest.approx(want, abs=1e-3) and [*found] == ["accuracy", "nll"]
    printed = capsys.readouterr().out
    assert f"training: images {first['images']}, classes 3, steps 8, batch 8, device CPU" in printed
    assert "8 steps are few: raise --steps, or lower --batch" in printed
    assert "best on held-out examples: step" in printed


def test_held_out_text_is_scored_at_each_save(in_texts, tmp_path):
    out = tmp_path / "x.pt"
    assert call(*TUNE_LM, "--steps", 4, "--hold-out", 0.5, "--lr", 1e-3, "--out", out) == 0
    first, *rows = log(out)
    model, examples = weights.load(out), text.load("sums.jsonl", "train")[1]
    data = text.encode(examples, Tokenizer(model.info["tokenizer"], "x"), model.arch["end"], 120)
    held = runs.hold_out(len(data.ids), 0.5)[1]
    want = scores.score_texts(weights.load(OLD), [(1.0, model)], text.batches(data, held, 8192))
    assert rows[-1]["held_out"] == pytest.approx(want, abs=1e-4) and [*rows[-1]["held_out"]][0] == "nll"
    assert [row["step"] for row in rows if "held_out" in row] == [1, 2, 3, 4]
    assert first["tokens"] == sum(map(len, data.ids)) and first["accum"] == 1


@pytest.mark.parametrize("name, best", [("accuracy", 6), ("nll", 4)])
def test_the_best_save_is_kept(tiny, tmp_path, monkeypatch, capsys, name, best):
    """Catches: The worst or the last save counts as the best, or another one's weights are kept."""
    out, values = tmp_path / "x.pt", iter([0.5, 0.1, 0.9, 0.7])
    monkeypatch.setattr(scores, "classification", lambda *_: {name: next(values, 0.3)} | dict(accuracy=0.3)
                        if name == "nll" else dict(accuracy=next(values, 0.3)))
    assert tune(tiny, out, "--steps", 8, "--lr", 1e-3, "--hold-out", 0.25, "--keep-best") == 0
    kept = read(tmp_path / "x.best.pt")
    assert kept["step"] == best and "optimizer" not in kept and read(out)["step"] == 8
    assert f"step {best} of 8, {name} 0.{9 if name == 'accuracy' else 1}" in capsys.readouterr().out
    assert weights.load(tmp_path / "x.best.pt", "prt", text=False)


def test_a_resumed_run_goes_on_in_its_log(tiny, tmp_path, monkeypatch):
    """Catches: Steps stand twice, or the time begins anew."""
    out, options = tmp_path / "x.pt", ("--steps", 4, "--hold-out", 0.25)
    command = ("train_vision.py", "--data", tiny.data, "--source", tiny.old, "--batch", 8, "--warmup", 0,
               "--out", out, *options)
    stopping = runs.stopping

    def stop():
        runs.STOP.signal = 2  # as after Ctrl-C
        return stopping()

    with monkeypatch.context() as patch:
        patch.setattr(runs, "stopping", stop)
        assert call(*command) == 130
    before = log(out)
    step = before[-1]["step"]
    assert 0 < step < 4 and not any("held_out" in row for row in before)  # it would delay the end
    with open(f"{out}.jsonl", "a") as f:
        later = dict(step=step + 1, loss=1.0, seconds=50.0)  # than the last save
        f.write(json.dumps(later) + '\n{"step": ')
    Path(f"{out}.jsonl").write_text(Path(f"{out}.jsonl").read_text().replace('"seconds": 0', '"seconds": 70'))
    assert call(*command, "--resume") == 0
    rows = log(out)
    assert rows[:len(before)] == [row | (dict(seconds=row["seconds"] + 70) if "seconds" in row else {})
                                  for row in before]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 4
    assert all(row["seconds"] >= 70 for row in rows if "loss" in row)


def test_what_a_log_or_the_best_checkpoint_would_replace_is_refused(tiny, tmp_path, capfd):
    """Catches: A user's file is overwritten; an old log is not."""
    out = tmp_path / "x.pt"
    (tmp_path / "x.pt.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    one_line(tune(tiny, out, "--steps", 1), capfd.readouterr().err, "x.pt.jsonl exists", "another --out")
    (tmp_path / "x.pt.jsonl").write_text('{"args": {}}\n')
    (tmp_path / "x.best.pt").touch()
    best = ("--steps", 1, "--hold-out", 0.25, "--keep-best")
    one_line(tune(tiny, out, *best), capfd.readouterr().err, "x.best.pt exists")
    assert tune(tiny, out, "--steps", 1) == 0 and log(out)[0]["args"]["out"] == str(out)
    pretrain = ("--method", "pretrain", "--keep-best", "--hold-out", 0.2)
    for words, reason in ((("--keep-best",), "needs examples that are not trained on: --hold-out 0.1"),
                          (pretrain, "--keep-best has no effect here (--method pretrain)")):
        assert tune(tiny, tmp_path / "y.pt", "--steps", 1, *words) == 2
        assert reason in capfd.readouterr().err


def test_what_looks_wrong_is_said(capsys):
    """Catches: Silence, or a warning where nothing is wrong."""
    args = SimpleNamespace(out="x.pt", keep_best=False)
    watch.end(args, [dict(args={}), dict(step=50, loss=2.0), dict(step=90, loss=1.0)], 90, 90)
    watch.end(args, [dict(args={}), dict(step=50, loss=2.0)], 50, 50)
    watch.end(args, [dict(args={}), dict(step=1, loss=1.0), dict(step=2, loss=2.0)], 2, 2)  # too few to tell
    watch.compare(args, 0.5, 0.5)
    assert not capsys.readouterr().out
    watch.end(args, [dict(args={}), dict(step=50, loss=1.0), dict(step=90, loss=2.0)], 90, 90)
    watch.compare(args, 0.5, 0.4)
    rose, below = capsys.readouterr().out.splitlines()
    assert rose == "the loss rose from 1.0000 to 2.0000: lower --lr, or raise --batch"
    assert below == "x.pt scores below its source: train longer, or with another --lr"


def test_a_log_that_cannot_be_written_does_not_end_the_run(tiny, tmp_path, monkeypatch, capsys):
    """Catches: A full disk ends training before its checkpoint is written."""
    out, write = tmp_path / "x.pt", watch.files.write_lines

    def write_and_link(path, rows):
        write(path, rows)
        path.unlink()
        path.symlink_to("/dev/full")

    monkeypatch.setattr(watch.files, "write_lines", write_and_link)
    assert tune(tiny, out, "--steps", 2) == 0 and read(out)["step"] == 2
    assert f"{out}.jsonl: a line is lost: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"args": ', '{"args": {}}\n{"step": 1, "seconds": "x"}\n', "[]\n"])
def test_a_damaged_log_does_not_break_a_resumed_run(tiny, tmp_path, capfd, text):
    """Catches: A traceback, or a log without its first line."""
    out = tmp_path / "x.pt"
    command = ("--steps", 4)
    interrupted("train_vision.py", "--data", tiny.data, "--source", tiny.old, "--batch", 8, "--warmup", 0,
                "--out", out, *command)
    Path(f"{out}.jsonl").write_text(text)
    code, err = tune(tiny, out, *command, "--resume"), capfd.readouterr().err
    if text.endswith("\n"):
        one_line(code, err, "x.pt.jsonl is damaged")
    else:
        assert code == 0 and "args" in log(out)[0] and log(out)[-1]["step"] == 4


def test_names_with_dots_have_their_own_best_checkpoints():
    assert held_out.best_file("out/lr0.003") == Path("out/lr0.003.best.pt")
    assert held_out.best_file("out/x.pt") == Path("out/x.best.pt")


@pytest.mark.parametrize("seconds, said", [(10, ["about 3 minutes"]), (1, [])])
def test_the_minutes_of_a_long_run_are_said(tiny, tmp_path, monkeypatch, capsys, seconds, said):
    """Catches: A run of hours begins without a word of it."""
    ticks = iter(range(0, 10**6, seconds))  # of the clock, which is read once a step and once a log step
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert tune(tiny, tmp_path / "x.pt", "--steps", 12) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("about")] == said


def test_curves_of_logs(tiny, tmp_path):
    """Catches: The picture is empty, or a run is missing."""
    for name, lr in dict(a=1e-3, b=1e-4).items():
        assert tune(tiny, tmp_path / f"{name}.pt", "--steps", 8, "--lr", lr, "--hold-out", 0.25) == 0
    pictures = []
    for run in (tmp_path / "a.pt", tmp_path):
        assert call_main(figures.main, "figures.py", "curves", run, tmp_path / "x.png") == 0
        pictures.append(Image.open(tmp_path / "x.png").convert("RGB"))
    one, two = pictures
    assert two.height > one.height
    colors = {color for _, color in two.getcolors(2**20)}
    assert {(0, 119, 187), (238, 119, 51)} <= colors
