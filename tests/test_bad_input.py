"""Bad input of the scripts: one line that says what to mend, exit code 2, and no file touched."""
import os
import resource
import signal
import subprocess
import sys

import prt
import pytest
import torch
from conftest import ROOT, call, interrupt, write_webdataset

from data import images
from models import weights

TRAIN = "train --data {data} --base {old} --steps 2 --batch 8 --warmup 0 --out {out}/x.pt "
EVAL = "eval --reward {reward} --base {new} --json {out}/x.json --picture {out}/x.png "


@pytest.fixture
def paths(tiny, tmp_path):
    """The names that the command lines below use."""
    (tmp_path / "out").mkdir()
    return vars(tiny) | dict(out=tmp_path / "out", none=tmp_path / "none")


def contents(*folders):
    return {f: f.read_bytes() for folder in folders for f in folder.rglob("*")
            if f.is_file() and f.relative_to(folder).parts[0] != "cache"}


def one_line(code, err, *words):
    """Exit code 2 and one line with these words; above an option that argparse refuses stands its usage."""
    assert code == 2, err
    if err.startswith("usage:"):
        err = err.splitlines()[-1].partition(": ")[2]
    assert err.startswith("error:") and len(err.splitlines()) == 1, err
    for word in words:
        assert str(word) in err


def spawn(command, tmp_path, **options):
    """A script in a process of its own: what pytest swallows (warnings, a traceback) shows on its stderr."""
    script, *argv = command.split()
    script = ROOT / dict(train="train_vision.py", eval="eval.py")[script]
    env = os.environ | dict(PRT_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, script, *argv], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=120, **options)
    return done.returncode, done.stderr


# Command lines in this process: the later of two equal options counts.
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
    "resume of a finished run": (TRAIN + "--resume --out {reward}", "--resume", "{reward}", "step 2"),
    "resume with another lr": (TRAIN + "--resume --out {half} --lr 1", "--resume", "{half}", "--lr"),
    "resume with another base": (TRAIN + "--resume --out {half} --base {new}", "{half}", "--base"),
    "resume with other steps": (TRAIN + "--resume --out {half} --steps 3", "--resume", "{half}", "--steps"),
    "resume of another program's file": (TRAIN + "--resume --out {foreign}", "--resume", "{foreign}"),
    "default run over another program's file": ("train --out {demo}", "{demo}/old.pt", "--out"),
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
    "no such reward": (EVAL + "--reward {none}/r.pt", "{none}/r.pt"),
    "base as reward": (EVAL + "--reward {old}", "{old} is a base"),
    "tuned as reward": (EVAL + "--reward {ft}", "{ft} is a fine-tuned"),
    "second reward is a base": (EVAL + "--reward {reward} {old}", "{old} is a base"),
    "reward as base of eval": (EVAL + "--base {reward}", "{reward} is a reward"),
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
    "no eval batch": (EVAL + "--batch 0", "--batch"),
}


@pytest.fixture
def damaged(paths):
    data, path = paths["reward"].read_bytes(), {}
    files = dict(damaged=data[:3000] + bytes(100_000) + data[103_000:], cut=data[: len(data) // 2], empty=b"")
    for name, content in files.items():
        path[name] = paths["out"] / f"{name}.pt"
        path[name].write_bytes(content)
    path["image"] = paths["out"] / "image.png"
    path["image"].write_bytes(b"\x89PNG")
    path["foreign"] = paths["out"] / "foreign.pt"
    torch.save(dict(model={}, optimizer={}, epoch=3), path["foreign"])
    path["demo"] = paths["out"] / "demo"
    path["demo"].mkdir()
    torch.save(dict(model={}), path["demo"] / "old.pt")
    return paths | path


@pytest.mark.parametrize("case", CASES)
def test_refused(damaged, capfd, case):
    """A traceback, an error that does not name the file or option, or files written before the refusal."""
    command, *words = (text.format(**damaged) for text in CASES[case])
    before = contents(damaged["out"], damaged["root"])
    code = call(*command.split())
    one_line(code, capfd.readouterr().err, *words)
    assert contents(damaged["out"], damaged["root"]) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(paths, capfd):
    for command in (TRAIN, EVAL):
        code = call(*command.format(**paths).split(), "--device", "cuda")
        one_line(code, capfd.readouterr().err, "cuda", "--device cpu")
    assert not contents(paths["out"])


def test_what_the_refused_runs_lack(paths, capfd):
    """The command lines above must fail for their own reason: as they stand here, they run."""
    assert call(*TRAIN.format(**paths).split()) == 0
    assert call(*EVAL.format(**paths).split()) == 0
    assert sorted(f.name for f in contents(paths["out"])) == ["x.json", "x.png", "x.pt"]
    assert capfd.readouterr().err == ""


def test_resume_ends_where_an_uninterrupted_run_ends(paths, capfd):
    """Too strict a refusal, or a resumed run that repeats a batch or forgets the optimizer's state."""
    half = paths["out"] / "half.pt"
    half.write_bytes(paths["half"].read_bytes())
    assert call(*TRAIN.format(**paths).split(), "--resume", "--out", half) == 0
    resumed, whole = weights.read(half), weights.read(paths["reward"])
    assert resumed["step"] == whole["step"] == 2 and "optimizer" not in resumed
    assert all(torch.equal(value, whole["model"][name]) for name, value in resumed["model"].items())


def test_resume_with_other_classes(paths, monkeypatch, capfd):
    """Class names that changed in between: the head keeps the old ones, the checkpoint names the new."""
    data = write_webdataset(paths["out"] / "data")
    command = [*TRAIN.format(**paths).split(), "--data", data]
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*command)
    (data / "classnames.txt").write_text("cyan\npink\nwhite\n")
    before = contents(paths["out"])
    capfd.readouterr()
    one_line(call(*command, "--resume"), capfd.readouterr().err, paths["out"] / "x.pt")
    assert contents(paths["out"]) == before


def test_nan_keeps_the_last_good_checkpoint(paths, monkeypatch, capfd):
    """A diverged run that writes its NaNs over the checkpoint it could go on from."""
    fit = prt.fit
    monkeypatch.setattr(prt, "fit", lambda *args, **options: fit(*args, **options | dict(save_every=1)))
    code = call(*TRAIN.format(**paths).split(), "--lr", "1e30", "--steps", "3")
    one_line(code, capfd.readouterr().err, "step 2", "nan", "--lr")
    assert list(contents(paths["out"])) == [paths["out"] / "x.pt"]
    assert weights.read(paths["out"] / "x.pt")["step"] == 1 and weights.load(paths["out"] / "x.pt", "prt")


# The same in a process of its own

SPAWNED = {
    "unknown data": (TRAIN + "--data shapez", "--data shapez"),
    "truncated reward": (EVAL + "--reward {cut}", "{cut}"),
    "diverged": (TRAIN + "--lr 1e30 --steps 8", "loss nan", "--lr"),
    "cifar100 out of reach": (TRAIN + "--data cifar100", images.CIFAR_URL, "cache/cifar-100-python.tar.gz"),
}


@pytest.mark.parametrize("case", SPAWNED)
def test_refused_by_a_process(damaged, tmp_path, case):
    """Warnings of libraries beside the one line, or another exit code once the interpreter ends."""
    command, *words = (text.format(**damaged) for text in SPAWNED[case])
    before = contents(damaged["out"], damaged["root"])
    one_line(*spawn(command, tmp_path), *words)
    assert contents(damaged["out"], damaged["root"]) == before


def test_full_disk(paths, tmp_path):
    """A disk that fills up while the last checkpoint is written: the one before it must survive."""
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    half = paths["out"] / "x.pt"
    half.write_bytes(paths["half"].read_bytes())
    before = contents(paths["out"])
    one_line(*spawn(TRAIN.format(**paths) + "--resume", tmp_path, preexec_fn=small_files), half)
    assert contents(paths["out"]) == before
