"""Bytes in and out (data/files.py, data/hub.py): formats, atomic writes, downloads, the lock."""
import contextlib
import http.client
import os
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import REFUSED, Handler
from helpers import write_safetensors, write_trap, write_truncated

from data import files, hub
from models import weights

# Reading

TENSORS = dict(a=torch.arange(6.0).reshape(2, 3), b=torch.tensor([1.5, -2], dtype=torch.bfloat16),
               none=torch.empty(0, 4), scalar=torch.tensor(3), mask=torch.tensor([True, False]))


def refused(path, words=""):
    with pytest.raises(ValueError, match=f"{path.name}: .*{words}"):
        files.read(path)


def test_safetensors_of_every_type_and_shape_are_read_and_never_written(tmp_path):
    """Catches: A tensor is read at a wrong offset, an empty one loses its shape, or metadata is one."""
    path = write_safetensors(tmp_path / "t.safetensors", TENSORS)
    before, read = path.read_bytes(), files.read(path)
    assert list(read) == list(TENSORS)
    for name, x in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (x.dtype, x.shape)
        assert torch.equal(read[name], x)
    read["a"] += 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:40], lambda data: data[:-1],
    lambda data: (1 << 60).to_bytes(8, "little") + data[8:], lambda data: (2).to_bytes(8, "little") + b"[]",
    lambda data: data[:9] + b"\xff" + data[10:],
    dict(data_offsets=[0, 800], shape=[200]), dict(data_offsets=[-8, 0]), dict(data_offsets=None),
    dict(shape=[3]), dict(shape=[-1, -2]), dict(shape=[0.5, 4]), dict(dtype="F4")])
def test_damaged_safetensors_are_refused(tmp_path, damage):
    """Catches: Bytes past the end are read, or the error does not name the file. A dict: a header entry."""
    entry = damage if isinstance(damage, dict) else {}
    path = write_safetensors(tmp_path / "t.safetensors", dict(a=torch.arange(2.0)), **entry)
    if not entry:
        path.write_bytes(damage(path.read_bytes()))
    refused(path)


def test_torch_files_that_are_cut_or_hold_no_dict_are_refused(tmp_path):
    for keep in (0, 10, 0.5, 0.99):
        refused(write_truncated(tmp_path, keep))
    for content in [1, 2], torch.ones(2):
        torch.save(content, tmp_path / "other.pt")
        refused(tmp_path / "other.pt", "not a dict")
    for name in "none.pt", "none.safetensors":  # missing, not damaged
        with pytest.raises(FileNotFoundError, match=name):
            files.read(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_run_no_code(tmp_path):
    trap, script = write_trap(tmp_path), tmp_path / "script.pt"
    refused(trap)
    torch.jit.script(torch.nn.Linear(2, 2)).save(script)
    with (zipfile.ZipFile(script) as plain, zipfile.ZipFile(trap) as pickles,
          zipfile.ZipFile(tmp_path / "run.pt", "w") as archive):
        for name in plain.namelist():
            is_pickle = name.endswith(".pkl")
            archive.writestr(name, pickles.read("trap/data.pkl") if is_pickle else plain.read(name))
    for path in script, tmp_path / "run.pt":
        with pytest.raises(ValueError, match=r"\A.*TorchScript.* timm/vit_base_patch16_clip_224.openai\Z"):
            weights.load(path)
    assert not (tmp_path / "trapped").exists()


# Writing

CHECKPOINT = dict(kind="clip", arch=dict(layers=[1, 2]), model=dict(a=torch.ones(2)), step=3)


@pytest.mark.parametrize("error, kind", [(OSError(28, "No space left on device"), OSError),
                                         (RuntimeError("unexpected pos 64"), OSError),
                                         (KeyboardInterrupt(), KeyboardInterrupt)])
@pytest.mark.parametrize("name", ["model.pt", "new.pt"])
def test_saved_file_is_read_back_and_stays_if_a_save_fails(tmp_path, monkeypatch, name, error, kind):
    path = tmp_path / "out" / "model.pt"
    files.save(path, CHECKPOINT)
    content = files.read(path)
    assert content | dict(model=None) == CHECKPOINT | dict(model=None)
    assert torch.equal(content["model"]["a"], torch.ones(2))
    before = path.read_bytes()

    def save_half(checkpoint, f):
        f.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(kind) as caught:
        files.save(path.with_name(name), CHECKPOINT)
    assert kind is KeyboardInterrupt or f"{name}: could not be written; the disk" in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Downloads

CONFIG, WEIGHTS = "/org/clip/resolve/main/config.json", "/org/clip/resolve/main/weights.bin"
TOKEN = "Bearer hf_secret"


@pytest.fixture
def server(serve, monkeypatch):
    """A hub with the repository org/clip: its config served directly, its weights by another host."""
    server, store = serve(), serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    store.files["/blob"] = bytes(range(256)) * 100
    server.files |= {CONFIG: b"{}", WEIGHTS: f"{store.url}/blob"}
    server.store = store
    return server


def fails(cache, name, *words, kind=OSError):
    """Asserts that a download fails in one line with its address and these words, and keeps nothing."""
    with pytest.raises(kind) as caught:
        hub.hub("org/clip", name)
    error = caught.value
    assert type(error) is kind and "\n" not in str(error)
    assert all(word in str(error) for word in (f"/org/clip/resolve/main/{name}", *words))
    assert "hf_secret" not in f"{error!r} {error.__cause__!r}"
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"]


def test_file_of_the_hub_is_downloaded_once_into_the_cache(server, cache):
    """Catches: A cached file still needs the network, or half a file, or a data set's, is taken for it."""
    server.store.lost = 10
    fails(cache, "weights.bin", "25600 of 25610 bytes", str(cache / "hub/org/clip/weights.bin"))
    server.store.lost = 0
    server.files["/datasets/org/clip/resolve/main/config.json"] = b"[]"
    for _ in range(2):
        for kind, name, content in (("", "config.json", b"{}"), ("datasets/", "config.json", b"[]"),
                                    ("", "weights.bin", server.store.files["/blob"])):
            path = hub.hub("org/clip", name, kind)
            assert path == cache / f"hub/{kind}org/clip" / name
            assert path.read_bytes() == content
    assert len(server.seen) == 1 + 3 and len(server.store.seen) == 1 + 1


@pytest.mark.parametrize("answer, words", [
    (401, ["401", "HF_TOKEN", "license at {hub}/org/clip,"]), (403, ["403", "HF_TOKEN"]), (500, ["500"]),
    (404, ["no such file"]), (f"{REFUSED}/x", []), ("http://[", []), ("file:///etc/hostname", []),
    (CONFIG, []), (None, [REFUSED + CONFIG, "{path}"])])
def test_failed_download_says_what_to_do(server, cache, monkeypatch, capfd, answer, words):
    """Catches: A gated file is reported as missing, or an error shows the token. answer: None: no network."""
    server.files[CONFIG], path = answer, cache / "hub/org/clip/config.json"
    if answer is None:
        monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    fails(cache, "config.json", *(word.format(hub=server.url, path=path) for word in words),
          kind=FileNotFoundError if answer == 404 else OSError)
    assert "hf_secret" not in "".join(capfd.readouterr())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")  # by hand
    assert hub.hub("org/clip", "config.json") == path


# Downloads: who receives the token, and what a proxy sends

@pytest.mark.parametrize("token, seen", [
    ("", [(CONFIG, None)]), ("\n", [(CONFIG, None)]), ("hf_secret\n", [(CONFIG, TOKEN)]),
    ("hf_secret hf_other", []), ("hf_secret\nX-Header: 1", []), ("hf_secret…", [])])
def test_token_is_sent_without_the_newline_of_its_file_or_not_at_all(server, monkeypatch, token, seen):
    monkeypatch.setenv("HF_TOKEN", token)
    with contextlib.nullcontext() if seen else pytest.raises((ValueError, OSError)) as caught:
        hub.hub("org/clip", "config.json")
    assert server.seen == seen
    assert seen or "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("target, header", [
    ("{hub}/moved", TOKEN), ("../../../../moved", TOKEN), ("/again", TOKEN), ("{store}/moved", None),
    ("{name}/moved", None), ("{https}/moved", None), ("{store}/again", None)])
def test_token_follows_redirects_within_the_hub_only(server, monkeypatch, target, header):
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open",  # without TLS, which the server lacks
                        lambda self, request: self.do_open(http.client.HTTPConnection, request))
    names = dict(hub=server.url, store=server.store.url, name=server.url.replace("127.0.0.1", "localhost"),
                 https=server.url.replace("http:", "https:"))
    server.files |= {CONFIG: target.format(**names), "/again": "/moved", "/moved": b'{"moved": 1}'}
    server.store.files |= {"/again": "/back", "/back": f"{server.url}/moved", "/moved": b'{"moved": 1}'}
    assert hub.hub("org/clip", "config.json").read_bytes() == b'{"moved": 1}'
    assert server.seen[0] == (CONFIG, TOKEN)
    assert {sent for _, sent in server.seen[1:] + server.store.seen} == {header}


@pytest.mark.parametrize("prefix", ["{store}", "{hub}0", "{hub}.evil.example", "{hub}@127.0.0.1:9"])
def test_token_is_not_sent_to_an_address_that_begins_like_the_hub(server, monkeypatch, prefix):
    """Catches: http://127.0.0.1:80800 begins with http://127.0.0.1:8080, and is another server."""
    sent = []
    monkeypatch.setattr(urllib.request.HTTPHandler, "http_open", lambda self, request: sent.append(
        request.get_header("Authorization")))
    url = prefix.format(hub=server.url, store=server.store.url) + "/x.json"
    with pytest.raises(OSError):
        hub.download(url, files.CACHE / "x.json")
    assert sent == [None]


@pytest.mark.parametrize("name, content, word", [
    ("config.json", b"<!DOCTYPE html>" * 500, "web page"), ("0.tar", b"<?xml version='1.0'?>", "web page"),
    ("x.safetensors", b" \n\t<HTML lang=en>", "web page"), ("x.txt", b"<!-- blocked -->", "web page"),
    ("x.json", b'{"a": "b"', "damaged JSON"), ("x.json", b"\xff\xfe\x00", "damaged JSON"),
    ("x.json", b"{} {}", "damaged JSON"), ("x.json", b"[" * 100_000, "damaged JSON"),
    ("x.json", "\"<html>Grüße …\"".encode(), None), ("x.txt", b"{a <html> tag\n", None),
    ("merges.txt", b"<unk>\n<s>\n", None), ("weights.bin", bytes(300), None)])
def test_web_pages_and_damaged_json_are_not_kept(server, cache, monkeypatch, name, content, word):
    """Catches: The page for signing in to a network is kept as the file. word: None if it is in order."""
    send, url = Handler.send_header, f"/org/clip/resolve/main/{name}"  # only the end tells the length
    monkeypatch.setattr(Handler, "send_header", lambda self, key, value: (
        None if key == "Content-Length" else send(self, key, value)))
    server.files |= {url: "/login", "/login": content}
    if word:
        fails(cache, name, word, server.url + url, str(cache / "hub/org/clip" / name))
        server.files[url] = content = b'{"a": 1}'
    assert hub.hub("org/clip", name).read_bytes() == content


def test_lock_lets_one_in_at_a_time():
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as second:
        with files.lock_cache():
            entered = pool.submit(second.enter_context, files.lock_cache())
            with pytest.raises(TimeoutError):
                entered.result(0.1)
        entered.result(10)


def test_processes_that_wait_for_a_download_take_the_file(cache, monkeypatch, serve):
    """Catches: Eight processes download a model one after another, or read it while it is downloaded."""
    monkeypatch.setenv("HF_ENDPOINT", (server := serve()).url)
    path = cache / "hub/org/clip/weights.bin"
    with ThreadPoolExecutor() as pool:
        with files.lock_cache():
            found = pool.submit(hub.hub, "org/clip", "weights.bin")
            with pytest.raises(TimeoutError):
                found.result(0.1)
            path.parent.mkdir(parents=True)
            path.write_bytes(b"whole")
        assert found.result(10) == path
    assert server.seen == [] and path.read_bytes() == b"whole"


# Files of torch.save, read whole or refused

def rewritten(path, change=None, twice=None, compression=zipfile.ZIP_STORED):
    """Writes another torch file: change(name, bytes) -> the bytes of each part. twice: the end of a name."""
    torch.save(dict(a=torch.arange(1000.0), b=torch.zeros(3)), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            for _ in range(1 + (twice is not None and name.endswith(twice))):
                archive.writestr(name, change(name, data) if change else data)
    return path


def cut(name, data):
    return data[:8] if name.endswith("/data/1") else data  # other parts follow, which mmap would read


def calls(name, data):
    return data.replace(b"ctorch\nFloatStorage", b"cbuiltins\nbytearray") if name.endswith(".pkl") else data


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("options, words", [
    (dict(compression=zipfile.ZIP_DEFLATED), "compressed"), (dict(twice="/data/0"), "same name"),
    (dict(change=cut), "sizes of its tensors|record size"), (dict(change=calls), "builtins bytearray")])
def test_a_torch_file_that_torch_alone_would_read_is_refused(tmp_path, options, words):
    """Catches: Memory beside a short part is read as weights, 5 GB come of 20 MB, or a part is lost."""
    files.read(rewritten(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=f"x.pt: damaged.*({words})"):
        files.read(rewritten(tmp_path / "x.pt", **options))


def test_a_flipped_bit_is_found_and_a_file_is_opened_once(tmp_path, monkeypatch):
    """Catches: Weights with a flipped bit load, or a file that is replaced in between is half of each."""
    path, x = tmp_path / "x.pt", torch.arange(1000.0)
    torch.save(dict(x=x), path)
    data, at = path.read_bytes(), path.read_bytes().find(x.numpy().tobytes())
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: (files.save(path, dict(x=-x)), load(
        *args, **options))[1])
    assert files.read(path)["x"].equal(x) and files.read(path)["x"].equal(-x)
    path.write_bytes(data[:at + 500] + bytes([data[at + 500] ^ 1]) + data[at + 501:])
    refused(path, "checksum")


@pytest.mark.parametrize("content, words", [
    (dict(x=torch.zeros(1).expand(10**9)), "larger than the file"),
    (dict(x=torch.ones(2, dtype=torch.complex64)),
                                                                      "ComplexFloatStorage"),
    (dict(x=torch.eye(2).to_sparse()), "sparse"), (dict(x=torch.ones(2, device="meta")), "meta")])
def test_tensors_that_are_not_what_they_take_in_the_file_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", words)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    """Catches: A pipe hangs the program, with the lock of the cache held."""
    os.mkfifo(tmp_path / "x.pt")
    for path in (tmp_path / "x.pt", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path}: a folder, a pipe, or a device"):
            files.read(path)
    with pytest.raises(ValueError, match="x.pt: .*a folder, a pipe"):
        weights.load(tmp_path / "x.pt")


def test_json_with_a_key_twice_and_safetensors_that_overlap_are_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    with pytest.raises(ValueError, match="x.json: not JSON: a key stands twice among c"):
        files.read_json(tmp_path / "x.json")
    two = dict(a=torch.zeros(2), b=torch.ones(2))
    for change in (dict(data_offsets=[0, 8]), dict(data_offsets=[4, 12])):
        refused(write_safetensors(tmp_path / "x.safetensors", two, **change), "overlap")


def test_a_locked_file_is_waited_for_with_a_word_or_refused(tmp_path, capfd):
    with ThreadPoolExecutor() as pool, files.lock(tmp_path / "lock"):
        with pytest.raises(BlockingIOError), files.lock(tmp_path / "lock", wait=False):
            pass
        entered = pool.submit(lambda: files.lock(tmp_path / "lock").__enter__())
        while not (said := capfd.readouterr().err) and not entered.done():
            time.sleep(0.01)
    assert said == f"waiting for another process, which has locked {tmp_path / 'lock'}\n"
    entered.result(10)


def test_lists_that_share_their_parts_are_read_at_once(tmp_path):
    """Catches: 60 nested pairs of one list are taken for 2^60 lists."""
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    torch.save(dict(kind=nested, x=torch.ones(2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="kind is "):
        weights.load(tmp_path / "x.pt")
