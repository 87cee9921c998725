"""What the tests share: a web server, small data sets and checkpoints, and calls of the scripts."""
import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).with_name("fixtures")
REFUSED = "http://127.0.0.1:9"  # every address but that of the tests' own server is refused at once
os.environ.update(http_proxy=REFUSED, https_proxy=REFUSED, no_proxy="127.0.0.1")
for name in ("HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)
sys.path[:0] = [str(ROOT), str(ROOT / "tests/measure")]
torch.set_num_threads(1)

import eval as eval_script
import prt
import train_lm
import train_vision
from data import files, images
from data import shapes as shapes_data
from models import pretrain, runs

SCRIPTS = {"train_vision.py": train_vision, "train_lm.py": train_lm, "eval.py": eval_script}
COLORS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255))
SUMS = [f"{a} + {b}" for a in (1, 2, 3, 4) for b in (2, 30, 17, 5, 9, 61)]
TALK = [dict(messages=[dict(role="user", content=f"What is {s}?"), dict(role="assistant", content="Well …"),
                       dict(role="user", content="So?"), dict(role="assistant", content=f"{eval(s)}.")])
        for s in SUMS]
# Command lines for the names of the fixture `paths`. Of two equal flags, the later one counts.
TRAIN = "train_vision.py --data {data} --source {old} --steps 2 --batch 8 --warmup 0 --out {out}/x.pt "
PRETRAIN = TRAIN.replace("--source {old}", "--method pretrain --size tiny")
EVAL = "eval.py --reward {reward} --base {new} --json {out}/x.json --picture {out}/x.png "
# The models of the fixture `texts`, and the start of many command lines in its folder.
REWARD, NEW, OLD, TUNED_SOURCE, TUNED_BASE = (
    f"out/arithmetic-0/{name}.pt" for name in ("reward", "new", "old", "tuned_source", "tuned_base"))
TRAIN_LM = ("train_lm.py", "--data", "sums.jsonl", "--batch", "8", "--accum", "1", "--length", "120",
            "--lr", "1e-3", "--weight-decay", "0", "--device", "cpu")
TUNE_LM = (*TRAIN_LM, "--source", OLD)
EVAL_LM = ("eval.py", "--reward", REWARD, "--base", NEW, "--device", "cpu", "--new-tokens", "8")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache for every test."""
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# A web server

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.seen.append((self.path, self.headers.get("Authorization")))
        answer = server.files.get(self.path, 404)
        body = answer if isinstance(answer, bytes) else b""
        self.send_response(200 if body else 302 if isinstance(answer, str) else answer)
        if isinstance(answer, str):
            self.send_header("Location", answer)
        self.send_header("Content-Length", str(len(body) + server.lost))
        self.end_headers()
        self.wfile.write(body)

    log_message = lambda *args: None


@pytest.fixture
def serve():
    """Starts web servers on this machine.

    files: path -> bytes, status, or URL to redirect to. seen: (path, Authorization). lost: bytes not sent.
    """
    with contextlib.ExitStack() as at_the_end:
        def start():
            server = at_the_end.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            server.files, server.seen, server.lost = {}, [], 0
            server.url = f"http://127.0.0.1:{server.server_address[1]}"
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            at_the_end.callback(server.shutdown)
            return server

        yield start


# Data sets

def png(color, size=(32, 32)):
    """Returns the bytes of a PNG of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def tar_bytes(members):
    """Returns a tar of (name, bytes) pairs, and the offsets of its members' headers and its end mark."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        offsets = []
        for name, data in members:
            offsets.append(tar.offset)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        offsets.append(tar.offset)
    return file.getvalue(), offsets


def pairs(labels, colors=COLORS):
    """Returns KEY.cls and KEY.png, an image of one color, for each label."""
    values = list(colors.values())
    return [member for i, label in enumerate(labels)
            for member in ((f"s{i}.cls", str(label).encode()), (f"s{i}.png", png(values[label])))]


def write_webdataset(root, colors=COLORS):
    """Writes clip-benchmark's layout with colors as classes: two shards to train on, and one to test."""
    classes = range(len(colors))
    for split, shards in dict(train=[[*classes] * 2, [*classes][::-1]], test=[[*classes]]).items():
        (root / split).mkdir(parents=True)
        (root / split / "nshards.txt").write_text(f"{len(shards)}\n")
        for i, labels in enumerate(shards):
            (root / split / f"{i}.tar").write_bytes(tar_bytes(pairs(labels, colors))[0])
    (root / "classnames.txt").write_text("".join(f"{c}\n" for c in colors))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nsomething {c}.\n")
    return root


def write_cifar100(path):
    """Writes an archive in CIFAR-100's form: 4 images to train on, 2 to test. Returns its path and pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)

    def table(rows, labels):
        data = pixels[rows].reshape(len(labels), -1)
        return {b"data": data, b"fine_labels": labels, b"coarse_labels": [1 - label for label in labels]}

    names = {b"fine_label_names": [b"apple", b"aquarium_fish"], b"coarse_label_names": [b"food", b"fish"]}
    members = dict(meta=names, train=table(slice(4), [0, 1, 1, 0]), test=table(slice(4, 6), [1, 0]))
    plain, _ = tar_bytes([(f"cifar-100-python/{n}", pickle.dumps(value)) for n, value in members.items()])
    path.write_bytes(gzip.compress(plain))
    return path, pixels


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# Calls of the scripts

def call_main(main, *argv):
    """Runs a main() in this process as the command line argv would; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, argv)])
        try:
            runs.main(main, getattr(sys.modules[main.__module__], "REMEDY", ""))
        except SystemExit as stop:
            return stop.code
    return 0


def call(script, *argv):
    """Runs a script's main() in this process as its command line would; returns the exit code."""
    return call_main(SCRIPTS[script].main, script, *argv)


def spawn(*command, cwd, cache=None, **options):
    """Runs a script, or other arguments of python, in a process of its own; returns the CompletedProcess."""
    command = [sys.executable, *(str(ROOT / word) if word in SCRIPTS else str(word) for word in command)]
    command = ["timeout", "-s", "KILL", "240", *command]  # also kills what the process has started
    environment = os.environ | dict(PRT_CACHE=str(cache or Path(cwd) / "cache"), OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, **options)


def output(*command, **options):
    """Returns what a process prints, which must succeed."""
    done = spawn(*command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROCESSES = f"""
import functools, json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import SCRIPTS, call, prt, torch
_, name, commands, stop = sys.argv
script, syncs = f"{{name}}.py", []
*finished, failing = json.loads(commands)
torch.compile = functools.partial(torch.compile, backend="eager")  # graphs without a compiler
synchronize = prt.FSDPModule.set_requires_gradient_sync
prt.FSDPModule.set_requires_gradient_sync = lambda model, last: syncs.append(last) or synchronize(model, last)
for command in finished:
    sys.argv[1:] = command
    SCRIPTS[script].main()
    counts = torch._dynamo.utils.counters
    print("graphs", counts["stats"]["unique_graphs"], "broken", len(counts["graph_break"]), "syncs", *syncs)
fit = prt.fit
prt.fit = lambda policy, indices, *args, **options: fit(
    policy, lambda step: 1 / 0 if step == int(stop) else indices(step), *args, **options)
assert call(script, *failing) == 2 and not prt.dist.is_initialized()
"""


def processes(n, script, commands, stop, folder, **options):
    """Runs command lines of a script (a name without .py) under torchrun, all in the same n processes.

    The last one fails in step `stop`. Returns what they print, with a line of counts after each command.
    """
    file = folder / "processes.py"
    file.write_text(PROCESSES)
    return output("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", file, script,
                  json.dumps(commands), stop, **options)


def interrupt(patch):
    """Makes a run save after every step and stop after the first of them."""
    fit, save = prt.fit, files.save

    def save_and_stop(path, checkpoint, **options):
        save(path, checkpoint, **options)
        if checkpoint.get("optimizer"):
            raise KeyboardInterrupt

    patch.setattr(prt, "fit", lambda *args, **options: fit(*args, **options | dict(save_every=1)))
    patch.setattr(files, "save", save_and_stop)


def interrupted(*command):
    """Begins a run that stops after its first step, as if killed, and leaves a checkpoint of it."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*command)


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b, **tolerance):
    """Returns whether the weights in two files are the same, bit for bit unless a tolerance is given."""
    a, b = read(a)["model"], read(b)["model"]
    close = (lambda x, y: torch.allclose(x, y, **tolerance)) if tolerance else torch.equal
    return a.keys() == b.keys() and all(close(x, b[name]) for name, x in a.items())


LOG = [".pt", ".jsonl"]  # see test_watch.py


def contents(*folders):
    """Returns the bytes of every file in some folders, but for those in a cache, and the logs of runs."""
    return {f: f.read_bytes() for folder in folders for f in folder.rglob("*")
            if f.is_file() and f.relative_to(folder).parts[0] != "cache" and f.suffixes[-2:] != LOG}


def one_line(code, err, *words):
    """Asserts exit code 2 and one line with these words, or argparse's: the usage and one line below it."""
    assert code == 2, err
    if err.startswith("usage:"):
        err = err.splitlines()[-1].partition(": ")[2]
    assert err.startswith("error:") and len(err.splitlines()) == 1, err
    for word in words:
        assert str(word) in err


def assert_refused(case, names, capfd, *folders):
    """Asserts that a command line fails with one line that has words, and leaves folders alone.

    case: the command line and the words, with the names in braces.
    """
    command, *words = (text.format(**names) for text in case)
    before = contents(*folders)
    capfd.readouterr()
    code = call(*command.split())
    one_line(code, capfd.readouterr().err, *words)
    assert contents(*folders) == before


@pytest.fixture
def report(tmp_path):
    """Runs eval.py and returns what it writes to --json."""
    def rows_and_more(*command):
        assert call(*command, "--json", tmp_path / "report.json") == 0
        return json.loads((tmp_path / "report.json").read_text())
    return rows_and_more


@pytest.fixture
def table(report):
    """Runs eval.py and returns the rows of its table."""
    return lambda *command: report(*command)["rows"]


# Models

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths: a data set, one of other classes, two CLIPs, a reward, a fine-tuned model, an unfinished run."""
    root = tmp_path_factory.mktemp("tiny")
    path = {name: root / f"{name}.pt" for name in ("old", "new", "reward", "ft", "half")}
    path |= dict(data=write_webdataset(root / "data"), other=write_webdataset(root / "other", {
        "cyan": (0, 255, 255), "pink": (255, 0, 255), "white": (255, 255, 255)}))
    train = ["train_vision.py", "--data", path["data"], "--steps", 2, "--batch", 8, "--warmup", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CACHE", root / "cache")
        for name, seed in dict(old=0, new=1).items():
            assert call(*train, "--method", "pretrain", "--size", "tiny", "--seed", seed,
                        "--out", path[name]) == 0
        for name, method in dict(reward="prt", ft="ft").items():
            assert call(*train, "--method", method, "--source", path["old"], "--out", path[name]) == 0
        interrupted(*train, "--source", path["old"], "--out", path["half"])
    return SimpleNamespace(root=root, **path)


@pytest.fixture(scope="session")
def damaged(tiny):
    """The paths of `tiny`, and files that are damaged or come from other programs."""
    data, root = tiny.reward.read_bytes(), tiny.root / "damaged"
    (root / "demo").mkdir(parents=True)
    (root / "damaged.pt").write_bytes(data[:3000] + bytes(100_000) + data[103_000:])
    (root / "empty.pt").touch()
    (root / "cut.pt").write_bytes(data[: len(data) // 2])
    torch.save(dict(model={}, optimizer={}, epoch=3), root / "foreign.pt")
    torch.save(dict(model={}), root / "demo/old.pt")
    return vars(tiny) | {path.stem: path for path in root.iterdir()}


@pytest.fixture
def paths(damaged, tmp_path):
    """The names in command lines for images."""
    (tmp_path / "out").mkdir()
    return damaged | dict(out=tmp_path / "out", none=tmp_path / "none")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A short run of train_vision.py without arguments, on few pictures: folder, cache, files, output."""
    folder, cache = tmp_path_factory.mktemp("shapes"), tmp_path_factory.mktemp("shapes-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CACHE", cache)
        patch.setattr(shapes_data, "COUNTS", dict(captioned=192, train=128, test=64))
        for split in shapes_data.COUNTS:
            images.load("shapes", split, 32)
    printed = output("train_vision.py", "--steps", 3, "--batch", 8, cwd=folder, cache=cache)
    written = sorted((folder / "out/shapes-0").iterdir())  # other tests write more files there
    return SimpleNamespace(folder=folder, cache=cache, written=written, printed=printed)


@pytest.fixture
def in_shapes(shapes, monkeypatch):
    """Makes the folder of `shapes` the current one, and its cache the one in use."""
    monkeypatch.chdir(shapes.folder)
    monkeypatch.setattr(files, "CACHE", shapes.cache)
    return shapes


FEW_PROBLEMS = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data import arithmetic
from models import examples
arithmetic.COUNTS = dict(old=1000, new=1000, train=200, test=50)
examples.EVAL = Path("few_eval.py").resolve()
sys.argv = [{root!r} + "/{script}", *sys.argv[1:], *{flags}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A short run of train_lm.py without arguments, on few problems: folder, with text files, output."""
    folder = tmp_path_factory.mktemp("texts")
    sums = [dict(prompt=f" {s} =", response=f" {eval(s)} #### {eval(s)}") for s in SUMS]
    (folder / "sums.jsonl").write_text(jsonl(sums))
    (folder / "talk.jsonl").write_text(jsonl(TALK))
    (folder / "book.txt").write_text("".join(f" {s} = {eval(s)}" for s in SUMS) * 20)
    for name, script, flags in (("few_train.py", "train_lm.py", []),
                                ("few_eval.py", "eval.py", ["--new-tokens", "8"])):
        (folder / name).write_text(FEW_PROBLEMS.format(root=str(ROOT), script=script, flags=flags))
    printed = output("few_train.py", "--steps", 3, "--batch", 8, cwd=folder)
    return SimpleNamespace(folder=folder, printed=printed)


@pytest.fixture
def in_texts(texts, monkeypatch):
    monkeypatch.chdir(texts.folder)
    return texts


@pytest.fixture(scope="session")
def malformed(texts, tiny, tmp_path_factory):
    """Names for command lines in the folder of `texts`: its models, and files and models with a fault."""
    root = tmp_path_factory.mktemp("malformed")
    for name, content in {"bad.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": 1}\n',
                          "numbers.jsonl": "5\n", "empty.jsonl": "",
                          "unasked.jsonl": '{"prompt": "", "response": "b"}\n',
                          "long.jsonl": jsonl([dict(prompt="a", response="long" * 300)])}.items():
        (root / name).write_text(content)
    torch.save(read(texts.folder / REWARD) | dict(data="sums.jsonl"), root / "file.pt")
    model = json.loads(whole := pretrain.TOKENIZER.read_text())["model"]
    vocab = {token: i for token, i in model["vocab"].items() if i < 400}
    model |= dict(vocab=vocab, merges=[pair for pair in model["merges"] if "".join(pair) in vocab])
    small = json.dumps(dict(model=model, pre_tokenizer=dict(type="ByteLevel", use_regex=True)))
    for name, fixture, tokenizer in (("llama", "llama2", small), ("endless", "qwen2", small),
                                     ("short", "llama2", whole)):
        shutil.copytree(FIXTURES / fixture, root / name)
        (root / name / "tokenizer.json").write_text(tokenizer)
    return dict(root=root, old=OLD, new=NEW, reward=REWARD, tuned=TUNED_SOURCE, clip=tiny.old,
                shapes=tiny.reward, data="sums.jsonl", book="book.txt", bare=FIXTURES / "llama3")
