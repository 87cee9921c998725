"""Networks of your own for images, file.py:function (models/own.py): trained, saved, and evaluated."""
import pytest
import torch
from conftest import call, call_main, one_line, read

import prt
from data import images
from models import export, flags, scores, weights

NET = """
import torch
from torch import nn
from parts import Scale

open("ran", "a").write("x")


class Net(nn.Module):
    def __init__(self, width, size, classes=3):
        super().__init__()
        self.image_size = size
        self.body = nn.Sequential(Scale(), nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))

    def forward(self, x):
        return self.body(x)


def old():
    torch.manual_seed(0)
    return Net(4, 32)


def new():
    torch.manual_seed(1)
    return Net(6, 40)


def four():
    return Net(4, 32, 4)


def sizeless():
    return nn.Linear(3, 3)


def nothing():
    return
"""
PARTS = """
from torch import nn


class Scale(nn.Module):
    def forward(self, x):
        return x.float() / 255 - 0.5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the file of networks."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "NAMED", set())
    return tmp_path


@pytest.fixture
def tune(tiny, folder):
    def run(out, *options):
        flags.NAMED.clear()  # each command is a process of its own
        return call("train_vision.py", "--data", tiny.data, "--source", "net.py:old", "--batch", 8,
                    "--steps", 4, "--warmup", 0, "--lr", 1e-2, "--out", out, *options)
    return run


def score(table, *command):
    flags.NAMED.clear()
    return {(row["method"], row["beta"]): row for row in table("eval.py", "--device", "cpu", *command)}


@pytest.mark.parametrize("options", [(), ("--augment",), ("--lora", 2)], ids=str)
def test_a_reward_on_a_network_of_ones_own(tiny, tune, table, options):
    """Catches: Another network is trained, saved, or loaded than the function returns."""
    assert tune("x.pt", *options) == 0 and tune("ft.pt", "--method", "ft") == 0
    rows = score(table, "--reward", "x.pt", "--source", "net.py:old", "--base", "net.py:new", "--beta", 0.5,
                 "--tuned-source", "ft.pt")
    flags.NAMED |= {"net.py:old", "net.py:new"}
    logits, data = {}, images.load(tiny.data, "test", 32)
    for name in ("x.pt", "ft.pt", "net.py:old", "net.py:new"):
        model = weights.load(name, text=False)
        x = images.load(tiny.data, "test", model.arch["image_size"]).images
        logits[name] = scores.predict(model, x)
        assert not model.training
    assert read("x.pt")["source"] == "net.py:old"
    assert not torch.allclose(logits["x.pt"], logits["net.py:old"])
    eft = prt.reward(logits["ft.pt"], logits["net.py:old"])
    for key, log_probs in {
            ("base + reward (PRT)", 0.5): prt.tilt(logits["net.py:new"], logits["x.pt"], 0.5),
            ("base + EFT", 0.5): prt.tilt(logits["net.py:new"], eft, 0.5),
            ("base alone", None): logits["net.py:new"].log_softmax(-1)}.items():
        want = scores.classification(log_probs, data.labels)
        assert rows[key]["nll"] == pytest.approx(want["nll"], abs=1e-4)
    assert tune("again.pt", "--reward-init", "x.pt", *options) == (2 if options == ("--lora", 2) else 0)


def test_a_run_is_resumed(tune, tiny, folder, monkeypatch):
    assert tune("whole.pt") == 0
    stops = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr("models.runs.stopping", lambda: next(stops))
        assert tune("x.pt") != 0
    assert read("x.pt")["step"] == 2 and tune("x.pt", "--resume") == 0
    assert all(torch.equal(x, read("x.pt")["model"][name]) for name, x in read("whole.pt")["model"].items())


def test_code_that_the_command_does_not_name_is_not_run(tune, folder, tmp_path, capfd):
    """Catches: A checkpoint from elsewhere chooses which code is run."""
    assert tune("x.pt") == 0
    (folder / "ran").unlink()
    command = ("eval.py", "--device", "cpu", "--reward", "x.pt", "--base")
    for more in (["net.py:new"], ["net.py:new", "--source", "x.pt"]):
        flags.NAMED.clear()
        one_line(call(*command, *more), capfd.readouterr().err, "net.py:old", "--source net.py:old")
    assert not (folder / "ran").exists()
    flags.NAMED.clear()
    with pytest.raises(PermissionError):
        weights.load("x.pt")
    (folder / "moved").mkdir()
    for name in ("net.py", "parts.py"):
        (folder / name).rename(folder / "moved" / name)
    assert call(*command, "moved/net.py:new", "--source", "moved/net.py:old") == 0


@pytest.mark.parametrize("source, options, words", [
    ("net.py:four", (), ["net.py:four", "[1, 4]", "[1, 3]"]),
    ("net.py:sizeless", (), ["net.py:sizeless", "image_size", "Linear"]),
    ("net.py:nothing", (), ["net.py:nothing", "torch.nn.Module", "NoneType"]),
    ("net.py:missing", (), ["net.py has no function missing"]),
    ("net.py:torch", (), ["net.py has no function torch"]),
    ("net.py", (), ["net.py: name a function in it, such as net.py:old"]),
    ("none.py:old", (), ["none.py:old", "no such file"]),
    ("net.py:old", ("--ticket", "base"), ["--ticket"]),
    ("net.py:old", ("--reward-init", "random"), ["--reward-init random"]),
    ("net.py:old", ("--method", "pretrain"), ["--method pretrain"])], ids=str)
def test_what_does_not_go_is_refused(tune, folder, capfd, source, options, words):
    assert tune("x.pt", *options, "--source", source) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "error: " in line and all(word in line for word in words)
    assert not (folder / "x.pt").exists()


def test_an_error_in_the_network_is_shown_where_it_is(tune, folder):
    """Catches: The traceback is lost, or nothing says that images are uint8."""
    (folder / "net.py").write_text(NET.replace("self.body(x)", "self.body[1](x)"))
    with pytest.raises(RuntimeError) as error:
        tune("x.pt")
    assert error.value.__notes__ == ["net.py:old was called on one image, uint8 [1, 3, 32, 32]"]


def test_a_file_may_be_a_module_like_any_other(tune, folder):
    """Catches: What looks up its module by name, as a dataclass, fails."""
    (folder / "net.py").write_text("from __future__ import annotations\nimport dataclasses\n\n\n"
                                   "@dataclasses.dataclass\nclass Sizes:\n    width: int = 4\n\n" + NET)
    assert tune("x.pt") == 0


def test_what_was_trained_is_neither_a_base_nor_exported(tune, folder, capfd):
    assert tune("ft.pt", "--method", "ft") == 0 and tune("x.pt") == 0
    one_line(tune("y.pt", "--source", "ft.pt"), capfd.readouterr().err, "ft.pt", "no base")
    flags.NAMED.clear()
    one_line(call_main(export.main, "export", "x.pt", "shared", "--source", "net.py:old"),
             capfd.readouterr().err, "x.pt", "a network of your own")


def test_another_network_is_not_taken_for_that_of_a_checkpoint(tune, folder, capfd):
    """Catches: --source, which has the same shapes, computes what the checkpoint says."""
    assert tune("x.pt") == 0
    (folder / "other.py").write_text(NET.replace("self.body(x)", "-self.body(x)"))
    flags.NAMED.clear()
    one_line(call("eval.py", "--device", "cpu", "--reward", "x.pt", "--source", "other.py:old", "--base",
                  "net.py:new"), capfd.readouterr().err, "net.py:old")


def test_a_network_for_text_is_refused(folder, capfd):
    one_line(call("train_lm.py", "--source", "net.py:old", "--data", "gsm8k"), capfd.readouterr().err,
             "net.py:old", "for images")


def test_weights_of_another_network_are_refused(tune, folder, capfd):
    """Catches: A changed file gives a reward that is in part random."""
    assert tune("x.pt") == 0
    (folder / "net.py").write_text(NET.replace("Net(4, 32)", "Net(5, 32)"))
    flags.NAMED.clear()
    one_line(call("eval.py", "--device", "cpu", "--reward", "x.pt", "--source", "net.py:old", "--base",
                  "net.py:new"), capfd.readouterr().err, "x.pt", "size mismatch")
