"""What the tests share: a web server, small data sets and checkpoints, calls of the scripts."""
import io
import os
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).with_name("fixtures")
REFUSED = "http://127.0.0.1:9"  # every address but the tests' own server is refused at once
os.environ.update(http_proxy=REFUSED, https_proxy=REFUSED, no_proxy="127.0.0.1")
for name in ("HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import eval as eval_script  # noqa: E402
import prt  # noqa: E402
import train_lm  # noqa: E402
import train_vision  # noqa: E402
from data import images  # noqa: E402
from models import weights  # noqa: E402

COLOURS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255))


def set_cache(patch, path):
    for module in (weights, images):
        patch.setattr(module, "CACHE", path)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    set_cache(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.seen.append((self.path, self.headers.get("Authorization")))
        found = server.files.get(self.path, 404)
        body = found if isinstance(found, bytes) else b""
        self.send_response(200 if body else 302 if isinstance(found, str) else found)
        if isinstance(found, str):
            self.send_header("Location", found)
        self.send_header("Content-Length", str(len(body) + server.lost))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Starts web servers. server.files: path -> bytes, a status, or the URL to redirect to; server.seen: the
    requests as (path, Authorization); server.lost: how many bytes of each promised body are not sent."""
    servers = []

    def start():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.files, server.seen, server.lost = {}, [], 0
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def png(colour, size=(32, 32)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def tar_bytes(members):
    """A tar of (name, bytes) pairs, and the offset of each member's header and of the end mark in it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        offsets = []
        for name, data in members:
            offsets.append(tar.offset)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        offsets.append(tar.offset)
    return out.getvalue(), offsets


def pairs(labels, colours=COLOURS):
    """KEY.cls and KEY.png of one solid image for each label."""
    values = list(colours.values())
    return [member for i, label in enumerate(labels)
            for member in ((f"s{i}.cls", str(label).encode()), (f"s{i}.png", png(values[label])))]


def write_webdataset(root, colours=COLOURS):
    """clip-benchmark's layout with colours as classes: a train split in two shards, a test split in one."""
    classes = range(len(colours))
    for split, shards in dict(train=[[*classes] * 2, [*classes][::-1]], test=[[*classes]]).items():
        (root / split).mkdir(parents=True)
        (root / split / "nshards.txt").write_text(f"{len(shards)}\n")
        for i, labels in enumerate(shards):
            (root / split / f"{i}.tar").write_bytes(tar_bytes(pairs(labels, colours))[0])
    (root / "classnames.txt").write_text("".join(f"{c}\n" for c in colours))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nsomething {c}.\n")
    return root


def call(script, *argv):
    """Runs a script's main() in this process as its command line would; returns the exit code."""
    scripts = dict(train=train_vision, train_lm=train_lm, eval=eval_script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        try:
            prt.run(scripts[script.removesuffix(".py")].main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths: a data set, one of other classes, two CLIPs, a reward, a fine-tuned model, an unfinished run."""
    root = tmp_path_factory.mktemp("tiny")
    path = {name: root / f"{name}.pt" for name in ("old", "new", "reward", "ft", "half")}
    path |= dict(data=write_webdataset(root / "data"), other=write_webdataset(root / "other", {
        "cyan": (0, 255, 255), "pink": (255, 0, 255), "white": (255, 255, 255)}))
    train = ["train", "--data", path["data"], "--steps", 2, "--batch", 8, "--warmup", 0]
    pretrain = [*train, "--method", "pretrain", "--size", "tiny"]
    with pytest.MonkeyPatch.context() as patch:
        set_cache(patch, root / "cache")
        for i, name in enumerate(("old", "new")):
            assert call(*pretrain, "--seed", i, "--out", path[name]) == 0
        for name, method in dict(reward="prt", ft="ft").items():
            assert call(*train, "--method", method, "--base", path["old"], "--out", path[name]) == 0
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*train, "--base", path["old"], "--out", path["half"])
    return SimpleNamespace(root=root, **path)


def interrupt(patch):
    """Makes a run save after every step and stop after the first of them."""
    fit, save = prt.fit, weights.save

    def save_and_stop(path, checkpoint):
        save(path, checkpoint)
        if checkpoint.get("optimizer"):
            raise KeyboardInterrupt

    patch.setattr(prt, "fit", lambda *args, **options: fit(*args, **options | dict(save_every=1)))
    patch.setattr(weights, "save", save_and_stop)
