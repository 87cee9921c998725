"""Bytes in and out (data/files.py): safetensors, torch files, atomic writes, downloads, the lock."""
import gzip
import http.client
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import REFUSED, Handler
from helpers import write_safetensors, write_trap, write_truncated

from data import files, hub

# safetensors

TENSORS = dict(a=torch.arange(6.0).reshape(2, 3), b=torch.tensor([1.5, -2], dtype=torch.bfloat16),
               none=torch.empty(0, 4), scalar=torch.tensor(3), mask=torch.tensor([True, False]))


def test_safetensors_of_every_type_and_shape_are_read(tmp_path):
    """Catches: A tensor is read at a wrong offset, an empty one loses its shape, or metadata is one."""
    read = files.read(write_safetensors(tmp_path / "t.safetensors", TENSORS))
    assert list(read) == list(TENSORS)
    for name, x in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (x.dtype, x.shape)
        assert torch.equal(read[name], x)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_safetensors_lie_in_a_private_mapping_of_their_file(tmp_path):
    """Catches: Every tensor is copied when it is read, or training changes the file."""
    path = write_safetensors(tmp_path / "big.safetensors", dict(a=torch.zeros(1 << 20)))
    before, a = path.read_bytes(), files.read(path)["a"]
    (span, mode), = (line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()
                     if path.name in line)
    low, high = (int(end, 16) for end in span.split("-"))
    assert low < a.data_ptr() < high and mode == "rw-p"
    a += 1
    assert (a == 1).all() and path.read_bytes() == before


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:40], lambda data: data[:-1],
    lambda data: (1 << 60).to_bytes(8, "little") + data[8:], lambda data: (2).to_bytes(8, "little") + b"[]",
    lambda data: data[:9] + b"\xff" + data[10:]],
    ids=["empty", "header cut", "data cut", "header too long", "header is a list", "no utf-8"])
def test_damaged_safetensors_are_refused(tmp_path, damage):
    """Catches: Bytes past the end of the file are read, or the error does not say which file it was."""
    path = write_safetensors(tmp_path / "t.safetensors", dict(a=torch.arange(2.0)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="t.safetensors"):
        files.read(path)


@pytest.mark.parametrize("entry", [
    dict(data_offsets=[0, 800], shape=[200]), dict(data_offsets=[-8, 0]), dict(data_offsets=[8, 0]),
    dict(data_offsets=[0]), dict(data_offsets=None), dict(shape=[1]), dict(shape=[3]), dict(shape=[-1, -2]),
    dict(shape=[0.5, 4]), dict(shape=[1 << 70, 0], data_offsets=[0, 0]), dict(dtype="F4")], ids=str)
def test_damaged_entries_of_safetensors_are_refused(tmp_path, entry):
    """Catches: A tensor reaches past its bytes, or the error does not say which file it was."""
    path = write_safetensors(tmp_path / "t.safetensors", dict(a=torch.arange(2.0)), **entry)
    with pytest.raises(ValueError, match="t.safetensors"):
        files.read(path)


# Files of torch

@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_torch_files_are_refused(tmp_path, keep):
    """Catches: A file that a full disk or an aborted copy cut gives an error that does not name it."""
    with pytest.raises(ValueError, match="cut.pt"):
        files.read(write_truncated(tmp_path, keep))


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2)])
def test_torch_files_without_a_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: .*not a dict"):
        files.read(tmp_path / "other.pt")


def test_pickles_run_no_code(tmp_path):
    """Catches: Unpickling a checkpoint from elsewhere runs whatever it asks for."""
    path = write_trap(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="trap.pt"):
            files.read(path)
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors"])
def test_missing_files_are_no_damaged_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        files.read(tmp_path / name)


# Writing

CHECKPOINT = dict(kind="clip", arch=dict(layers=[1, 2]), model=dict(a=torch.ones(2)), step=3)


@pytest.mark.parametrize("options", [{}, dict(compress=True)], ids=str)
def test_saved_files_are_read_back(tmp_path, options):
    path = tmp_path / "new" / "folder" / "model.pt"
    files.save(path, CHECKPOINT, **options)
    for lazy in (False, True):
        content = files.read(path, lazy)
        assert content | dict(model=None) == CHECKPOINT | dict(model=None)
        assert torch.equal(content["model"]["a"], torch.ones(2))


def test_compressed_files_have_the_same_bytes(tmp_path):
    """Catches: The time of day, or the file's temporary name, in the compressed file."""
    for name in ("a.pt", "b.pt"):
        files.save(tmp_path / name, CHECKPOINT, compress=True)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (tmp_path / "a.pt").read_bytes()[4:8] == bytes(4)  # gzip's field for the time


@pytest.mark.parametrize("damage, words", [
    (lambda data: data[:500], "ended"), (lambda data: data[:-4] + b"1234", "length"),
    (lambda data: gzip.compress(bytes(10**8)), "expands to more than")], ids=["cut", "length", "large"])
def test_damaged_compressed_files_are_refused(tmp_path, damage, words):
    """Catches: A file of a few bytes that expands to gigabytes is expanded."""
    files.save(tmp_path / "x.pt", CHECKPOINT, compress=True)
    (tmp_path / "x.pt").write_bytes(damage((tmp_path / "x.pt").read_bytes()))
    with pytest.raises(ValueError, match=f"x.pt: .*{words}"):
        files.read(tmp_path / "x.pt")


@pytest.mark.parametrize("error, kind", [(OSError(28, "No space left on device"), OSError),
                                         (RuntimeError("unexpected pos 64"), OSError),
                                         (KeyboardInterrupt(), KeyboardInterrupt)])
@pytest.mark.parametrize("name", ["model.pt", "new.pt"])
def test_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch, name, error, kind):
    """Catches: A disk that fills up during a write costs the old checkpoint, or half a file stays."""
    path = tmp_path / "out" / "model.pt"
    files.save(path, CHECKPOINT)
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
def hub(serve, monkeypatch):
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
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_file_of_the_hub_is_downloaded_once_into_the_cache(hub, cache):
    """Catches: A cached file still needs the network, or a data set's is taken for a model's."""
    hub.files["/datasets/org/clip/resolve/main/config.json"] = b"[]"
    for _ in range(2):
        for kind, name, content in (("", "config.json", b"{}"), ("datasets/", "config.json", b"[]"),
                                    ("", "weights.bin", hub.store.files["/blob"])):
            path = hub.hub("org/clip", name, kind)
            assert path == cache / f"hub/{kind}org/clip" / name
            assert path.read_bytes() == content
    assert len(hub.seen) == 3 and len(hub.store.seen) == 1


def test_short_body_leaves_nothing(hub, cache):
    """Catches: The half file of a dropped connection is taken for the whole one from then on."""
    hub.store.lost = 10
    fails(cache, "weights.bin", "25600 of 25610 bytes", str(cache / "hub/org/clip/weights.bin"))
    hub.store.lost = 0
    assert hub.hub("org/clip", "weights.bin").read_bytes() == hub.store.files["/blob"]


@pytest.mark.parametrize("answer, words", [
    (401, ["401", "HF_TOKEN", "license at {hub}/org/clip,"]), (403, ["403", "HF_TOKEN"]), (500, ["500"]),
    (404, ["no such file"]), ("http://127.0.0.1:9/x", []), ("http://[", []), ("file:///etc/hostname", []),
    (CONFIG, [])])
def test_failed_download_says_what_to_do_and_does_not_quote_the_token(hub, cache, capfd, answer, words):
    """Catches: A gated file is reported as missing, or an error shows the headers of its request."""
    hub.files[CONFIG] = answer
    fails(cache, "config.json", *(word.format(hub=hub.url) for word in words),
          kind=FileNotFoundError if answer == 404 else OSError)
    assert "hf_secret" not in "".join(capfd.readouterr())


def test_without_network_a_file_may_be_put_into_the_cache_by_hand(monkeypatch, cache):
    """Catches: The message does not say what to download, or where to put it."""
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    path = cache / "hub/org/clip/config.json"
    fails(cache, "config.json", REFUSED + CONFIG, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert hub.hub("org/clip", "config.json") == path


# Downloads: who receives the token

@pytest.mark.parametrize("token, header", [("", None), ("\n", None), ("hf_secret\n", TOKEN)])
def test_token_is_sent_without_the_newline_of_its_file_or_not_at_all(hub, monkeypatch, token, header):
    """Catches: The hub refuses an empty token for files that need none."""
    monkeypatch.setenv("HF_TOKEN", token)
    hub.hub("org/clip", "config.json")
    assert hub.seen == [(CONFIG, header)]


@pytest.mark.parametrize("value", ["hf_secret hf_other", "hf_secret\nX-Header: 1", "hf_secret…"])
def test_no_error_quotes_a_token_that_no_header_can_hold(hub, monkeypatch, value):
    monkeypatch.setenv("HF_TOKEN", value)
    with pytest.raises((ValueError, OSError)) as caught:
        hub.hub("org/clip", "config.json")
    assert "hf_secret" not in str(caught.value)
    assert not hub.seen


@pytest.mark.parametrize("target, header", [
    ("{hub}/moved", TOKEN), ("/moved", TOKEN), ("../../../../moved", TOKEN), ("/again", TOKEN),
    ("{store}/moved", None), ("{name}/moved", None), ("{https}/moved", None), ("{store}/back", None),
    ("{store}/again", None)])
def test_token_follows_redirects_within_the_hub_only(hub, monkeypatch, target, header):
    """Catches: Another name of the machine, scheme, or host gets the token, also after several redirects.

    A host that was redirected to may lead back to the hub, to a page of its choice.
    """
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open",  # without TLS, which the server lacks
                        lambda self, request: self.do_open(http.client.HTTPConnection, request))
    names = dict(hub=hub.url, store=hub.store.url, name=hub.url.replace("127.0.0.1", "localhost"),
                 https=hub.url.replace("http:", "https:"))
    hub.files |= {CONFIG: target.format(**names), "/again": "/moved", "/moved": b'{"moved": 1}'}
    hub.store.files |= {"/again": "/back", "/back": f"{hub.url}/moved", "/moved": b'{"moved": 1}'}
    assert hub.hub("org/clip", "config.json").read_bytes() == b'{"moved": 1}'
    assert hub.seen[0] == (CONFIG, TOKEN)
    assert {sent for _, sent in hub.seen[1:] + hub.store.seen} == {header}


@pytest.mark.parametrize("prefix", ["{store}", "{hub}0", "{hub}.evil.example", "{hub}@127.0.0.1:9"])
def test_token_is_not_sent_to_an_address_that_begins_like_the_hub(hub, monkeypatch, prefix):
    """Catches: http://127.0.0.1:80800 begins with http://127.0.0.1:8080, and is another server."""
    sent = []

    def watched(self, request, *args):
        sent.append(request.get_header("Authorization"))
        raise OSError("not opened")

    monkeypatch.setattr(urllib.request.HTTPHandler, "http_open", watched)
    with pytest.raises(OSError):
        hub.download(prefix.format(hub=hub.url, store=hub.store.url) + "/x.json", files.CACHE / "x.json")
    assert sent == [None]


# Downloads: what a proxy sends instead of a file

@pytest.fixture
def no_length(monkeypatch):
    """Makes the servers send no Content-Length: nothing but the end of the connection tells the length."""
    send = Handler.send_header
    monkeypatch.setattr(Handler, "send_header", lambda self, key, value: (
        None if key == "Content-Length" else send(self, key, value)))


@pytest.mark.parametrize("name, content, word", [
    ("config.json", b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    ("model.safetensors", b" \n\t<HTML lang=en>Blocked", "web page"),
    ("classnames.txt", b"<!doctype HTML>\n" + b"x" * 5_000, "web page"),
    ("train/0.tar", b"<?xml version='1.0'?>", "web page"), ("merges.txt", b"<!-- blocked -->", "web page"),
    ("tokenizer.json", b'{"layers.0": "model-00001-of-00002.safetensors"', "damaged JSON"),
    ("config.json", b"Access denied", "damaged JSON"), ("config.json", b"\xff\xfe\x00", "damaged JSON"),
    ("config.json", b"{} {}", "damaged JSON"), ("config.json", b"[" * 100_000, "damaged JSON")])
def test_web_pages_and_damaged_json_are_not_kept(hub, cache, no_length, name, content, word):
    """Catches: The page for signing in to a network is kept as the file, until somebody deletes it."""
    url = f"/org/clip/resolve/main/{name}"
    hub.files |= {url: "/login", "/login": content}
    fails(cache, name, word, hub.url + url, str(cache / "hub/org/clip" / name))
    hub.files[url] = b'{"a": 1}'
    assert hub.hub("org/clip", name).read_bytes() == b'{"a": 1}'


@pytest.mark.parametrize("name, content", [
    ("config.json", b" [1, 2]\n"), ("config.json", b'"<html>"'), ("config.json", "\"Grüße …\"".encode()),
    ("classnames.txt", b"{not json"), ("classnames.txt", b"a <html> tag\n"), ("merges.txt", b"<unk>\n<s>\n"),
    ("weights.bin", bytes(300))])
def test_files_in_order_arrive_as_they_were_sent(hub, no_length, name, content):
    """Catches: What is no JSON is refused as such, or a file loses the bytes that the check has read."""
    hub.files[f"/org/clip/resolve/main/{name}"] = content
    assert hub.hub("org/clip", name).read_bytes() == content


# The lock

def test_lock_lets_one_in_at_a_time():
    """Catches: Processes that start together all download the same file."""
    entered = threading.Event()

    def second():
        with files.lock():
            entered.set()

    thread = threading.Thread(target=second)
    with files.lock():
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    thread.join(10)
