"""Bytes in and out (data/files.py): safetensors, torch files, atomic writes, downloads, the lock."""
import http.client
import json
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import REFUSED, Handler
from helpers import write_safetensors, write_trap, write_truncated

from data import files

# safetensors

TENSORS = dict(a=torch.arange(6.0).reshape(2, 3), b=torch.tensor([1.5, -2], dtype=torch.bfloat16),
               none=torch.empty(0, 4), scalar=torch.tensor(3), mask=torch.tensor([True, False]))


def test_safetensors_of_every_type_and_shape_are_read(tmp_path):
    """Catches: A tensor is read at a wrong offset, an empty one loses its shape, or metadata is one."""
    read = files.read(write_safetensors(tmp_path / "t.safetensors", TENSORS))
    assert list(read) == list(TENSORS)
    for name, x in TENSORS.items():
        assert read[name].dtype == x.dtype
        assert read[name].shape == x.shape
        assert torch.equal(read[name], x)


def test_writes_to_safetensors_stay_in_memory(tmp_path):
    """Catches: Training through the memory map fails, or changes the file."""
    path = write_safetensors(tmp_path / "t.safetensors", TENSORS)
    before = path.read_bytes()
    a = files.read(path)["a"]
    a += 1
    assert torch.equal(a, TENSORS["a"] + 1)
    assert path.read_bytes() == before
    assert torch.equal(files.read(path)["a"], TENSORS["a"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_safetensors_lie_in_a_private_mapping_of_their_file(tmp_path):
    """Catches: Every tensor is copied when it is read."""
    path = write_safetensors(tmp_path / "big.safetensors", dict(a=torch.zeros(1 << 20)))
    a = files.read(path)["a"]
    (span, mode), = (line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()
                     if path.name in line)
    low, high = (int(end, 16) for end in span.split("-"))
    assert low < a.data_ptr() < high
    assert mode == "rw-p"


DAMAGE = {
    "bad header length": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    "header length one short": lambda data: bytes([data[0] - 1]) + data[1:],
    "header is a list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "no utf-8": lambda data: data[:9] + b"\xff" + data[10:],
    "truncated data": lambda data: data[:-1],
    "truncated header": lambda data: data[:40],
    "truncated length": lambda data: data[:5],
    "empty": lambda data: b"",
}
ENTRIES = {
    "offsets beyond the end": dict(data_offsets=[0, 800], shape=[200]),
    "negative offset": dict(data_offsets=[-8, 0]),
    "offsets swapped": dict(data_offsets=[8, 0]),
    "shape too small": dict(shape=[1]),
    "shape too large": dict(shape=[3]),
    "negative shape": dict(shape=[-2]),
    "two negative sizes": dict(shape=[-1, -2]),
    "fractional shape": dict(shape=[0.5, 4]),
    "shape beyond 64 bits": dict(shape=[1 << 70, 0], data_offsets=[0, 0]),
    "unknown dtype": dict(dtype="F4"),
    "no dtype": dict(dtype=None),
    "entry without offsets": dict(data_offsets=None),
    "one offset": dict(data_offsets=[0]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_safetensors_are_refused(tmp_path, damage):
    """Catches: Bytes past the end of the file are read, or the error does not say which file it was."""
    path = write_safetensors(tmp_path / "t.safetensors", dict(a=torch.arange(2.0)))
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match="t.safetensors"):
        files.read(path)


@pytest.mark.parametrize("entry", ENTRIES)
def test_damaged_entries_of_safetensors_are_refused(tmp_path, entry):
    """Catches: A tensor reaches past its bytes, or the error does not say which file it was."""
    path = write_safetensors(tmp_path / "t.safetensors", dict(a=torch.arange(2.0)), **ENTRIES[entry])
    with pytest.raises(ValueError, match="t.safetensors"):
        files.read(path)


# Files of torch

@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_torch_files_are_refused(tmp_path, keep):
    """Catches: A file that a full disk or an aborted copy cut gives an error that does not name it."""
    with pytest.raises(ValueError, match="cut.pt"):
        files.read(write_truncated(tmp_path, keep))


@pytest.mark.parametrize("content", [[1, 2], 3, torch.ones(2)])
def test_torch_files_without_a_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: .*not a dict"):
        files.read(tmp_path / "other.pt")


def test_pickles_run_no_code(tmp_path):
    """Catches: Unpickling a checkpoint from elsewhere runs whatever it asks for."""
    with pytest.raises(ValueError, match="trap.pt"):
        files.read(write_trap(tmp_path))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors"])
def test_missing_files_are_no_damaged_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        files.read(tmp_path / name)


# Writing

CHECKPOINT = dict(kind="clip", arch=dict(layers=[1, 2]), model=dict(a=torch.ones(2)), step=3)


def test_saved_files_are_read_back(tmp_path):
    path = tmp_path / "new" / "folder" / "model.pt"
    files.save(path, CHECKPOINT)
    assert torch.load(path, weights_only=True)["arch"] == dict(layers=[1, 2])
    assert files.read(path) | dict(model=None) == CHECKPOINT | dict(model=None)
    assert torch.equal(files.read(path)["model"]["a"], torch.ones(2))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")])
@pytest.mark.parametrize("name", ["model.pt", "new.pt"])
def test_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch, name, error):
    """Catches: A disk that fills up during a write costs the old checkpoint, or half a file stays."""
    path = tmp_path / "out" / "model.pt"
    files.save(path, CHECKPOINT)
    before = path.read_bytes()

    def save_half(checkpoint, f):
        f.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(OSError, match=f"{name}: .*disk"):  # which disk is full
        files.save(path.with_name(name), CHECKPOINT)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_write_leaves_the_folder_as_it_was(tmp_path):
    """Catches: Ctrl-C during a download leaves a file that is taken for the whole one."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as f:
        f.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Downloads

CONFIG, WEIGHTS = "/org/clip/resolve/main/config.json", "/org/clip/resolve/main/weights.bin"


@pytest.fixture
def hub(serve, monkeypatch):
    """A hub with the repository org/clip: its config served directly, its weights by another host."""
    server, store = serve(), serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    store.files["/blob"] = bytes(range(256)) * 100
    server.files |= {CONFIG: b"{}", WEIGHTS: f"{store.url}/blob"}
    server.store = store
    return server


def test_file_of_the_hub_is_downloaded_into_the_cache(hub, cache):
    path = files.hub("org/clip", "weights.bin")
    assert path == cache / "hub/org/clip/weights.bin"
    assert path.read_bytes() == hub.store.files["/blob"]


def test_data_sets_of_the_hub_have_a_folder_of_their_own(hub, cache):
    hub.files["/datasets/org/clip/resolve/main/config.json"] = b"[]"
    assert files.hub("org/clip", "config.json").read_bytes() == b"{}"
    path = files.hub("org/clip", "config.json", "datasets/")
    assert path == cache / "hub/datasets/org/clip/config.json"
    assert path.read_bytes() == b"[]"


def test_file_is_downloaded_once(hub):
    """Catches: A cached file still needs the network."""
    for _ in range(2):
        files.hub("org/clip", "weights.bin")
    assert len(hub.seen) == len(hub.store.seen) == 1


def test_token_stays_with_the_hub(hub, monkeypatch):
    """Catches: The token follows the redirect to the storage host, and so is given away."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files.hub("org/clip", "config.json")
    files.hub("org/clip", "weights.bin")
    assert hub.seen == [(CONFIG, "Bearer hf_secret"), (WEIGHTS, "Bearer hf_secret")]
    assert hub.store.seen == [("/blob", None)]


def test_token_is_not_sent_to_another_host(hub, monkeypatch):
    """Catches: A data set's own server receives the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files.download(f"{hub.store.url}/blob", files.CACHE / "elsewhere")
    assert hub.store.seen == [("/blob", None)]


@pytest.mark.parametrize("token", [None, "", "\n"])
def test_without_a_token_no_header_is_sent(hub, monkeypatch, token):
    """Catches: The hub refuses an empty token for files that need none."""
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    files.hub("org/clip", "config.json")
    files.hub("org/clip", "weights.bin")
    assert hub.seen == [(CONFIG, None), (WEIGHTS, None)]


def test_newline_at_the_end_of_a_token_is_dropped(hub, monkeypatch):
    """Catches: A token with the newline of its file is refused, in a message that quotes it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    files.hub("org/clip", "config.json")
    assert hub.seen == [(CONFIG, "Bearer hf_secret")]


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_token_is_never_printed(hub, monkeypatch, capfd, status):
    """Catches: The error of a refused request quotes its header."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files[CONFIG] = status
    with pytest.raises(OSError) as caught:
        files.hub("org/clip", "config.json")
    assert "hf_secret" not in str(caught.value)
    assert "hf_secret" not in "".join(capfd.readouterr())


def test_short_body_leaves_nothing(hub, cache):
    """Catches: The half file of a dropped connection is taken for the whole one from then on."""
    hub.store.lost = 10
    with pytest.raises(OSError, match=WEIGHTS):
        files.hub("org/clip", "weights.bin")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    hub.store.lost = 0
    assert files.hub("org/clip", "weights.bin").read_bytes() == hub.store.files["/blob"]


@pytest.mark.parametrize("status", [401, 403])
def test_gated_file_is_told_from_a_missing_one(hub, cache, status):
    """Catches: The message about a gated or misspelled model does not say what to do."""
    hub.files[CONFIG] = status
    with pytest.raises(OSError, match=CONFIG) as caught:
        files.hub("org/clip", "config.json")
    assert not isinstance(caught.value, FileNotFoundError)
    assert str(status) in str(caught.value)
    assert f"license at {hub.url}/org/clip," in str(caught.value)
    assert "HF_TOKEN" in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_missing_file_of_the_hub_is_a_missing_file(hub, cache):
    with pytest.raises(FileNotFoundError, match="/org/clip/resolve/main/none.json"):
        files.hub("org/clip", "none.json")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_without_network_a_file_may_be_put_into_the_cache_by_hand(monkeypatch, cache):
    """Catches: The message does not say what to download, or where to put it."""
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    path = cache / "hub/org/clip/config.json"
    with pytest.raises(OSError) as caught:
        files.hub("org/clip", "config.json")
    assert REFUSED + CONFIG in str(caught.value)
    assert str(path) in str(caught.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert files.hub("org/clip", "config.json") == path


# Downloads: who receives the token

TOKEN = "Bearer hf_secret"


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.mark.parametrize("target", ["{url}/moved", "/moved", "moved", "../main/moved"])
def test_token_follows_a_redirect_within_the_hub(hub, token, target):
    """Catches: A repository that was renamed, to which the Hub redirects, is gated in spite of the token."""
    moved = "/org/clip/resolve/main/moved" if not target.startswith(("{", "/")) else "/moved"
    hub.files |= {CONFIG: target.format(url=hub.url), moved: b'{"moved": 1}'}
    assert files.hub("org/clip", "config.json").read_bytes() == b'{"moved": 1}'
    assert hub.seen == [(CONFIG, TOKEN), (moved, TOKEN)]


def test_token_follows_several_redirects_within_the_hub(hub, token):
    hub.files |= {CONFIG: "/a", "/a": f"{hub.url}/b", "/b": "/c", "/c": b"{}"}
    files.hub("org/clip", "config.json")
    assert hub.seen == [(path, TOKEN) for path in (CONFIG, "/a", "/b", "/c")]


def test_token_is_not_sent_to_another_name_of_the_same_machine(hub, token):
    """Catches: Hosts are compared by their port only."""
    elsewhere = hub.url.replace("127.0.0.1", "localhost")
    hub.files |= {CONFIG: f"{elsewhere}/moved", "/moved": b"{}"}
    files.hub("org/clip", "config.json")
    assert hub.seen == [(CONFIG, TOKEN), ("/moved", None)]


def test_token_is_not_sent_by_another_scheme(hub, token, monkeypatch):
    """Catches: The token goes over the wire in the clear, since the host and the port are the same."""
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open",  # without TLS, which the server lacks
                        lambda self, request: self.do_open(http.client.HTTPConnection, request))
    hub.files |= {CONFIG: f"{hub.url.replace('http:', 'https:')}/moved", "/moved": b"{}"}
    files.hub("org/clip", "config.json")
    assert hub.seen == [(CONFIG, TOKEN), ("/moved", None)]


@pytest.mark.parametrize("back", ["{hub}/back", "/on"], ids=["to the hub", "on the other host"])
def test_token_never_returns_after_another_host(hub, token, back):
    """Catches: Another host sends the request on, and the token with it, to a page of its choice."""
    hub.files |= {CONFIG: f"{hub.store.url}/there", "/back": b"{}"}
    hub.store.files |= {"/there": back.format(hub=hub.url), "/on": f"{hub.url}/back"}
    files.hub("org/clip", "config.json")
    assert hub.seen == [(CONFIG, TOKEN), ("/back", None)]
    assert hub.store.seen and {sent for _, sent in hub.store.seen} == {None}


@pytest.mark.parametrize("prefix", ["{hub}0", "{hub}.evil.example", "{hub}@127.0.0.1:9"])
def test_token_is_not_sent_to_an_address_that_begins_like_the_hub(hub, token, monkeypatch, prefix):
    """Catches: http://127.0.0.1:80800 begins with http://127.0.0.1:8080, and is another server."""
    sent = []

    def watched(self, request, *args):
        sent.append(request.get_header("Authorization"))
        raise OSError("not opened")

    monkeypatch.setattr(urllib.request.HTTPHandler, "http_open", watched)
    with pytest.raises(OSError):
        files.download(prefix.format(hub=hub.url) + "/config.json", files.CACHE / "config.json")
    assert sent == [None]


# Downloads: what a proxy sends instead of a file

PAGES = [b"<!DOCTYPE html><html>Sign in</html>", b"<html><body>Blocked</body></html>",
         b" \n\t<HTML lang=en>Blocked", b"<!doctype HTML>\n" + b"x" * 5_000]


def left(cache):
    """Returns all files in the cache."""
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "classnames.txt", "train/0.tar"])
@pytest.mark.parametrize("redirected", [False, True])
def test_a_web_page_is_not_taken_for_a_file(hub, cache, token, name, page, redirected):
    """Catches: The page for signing in to a network is kept as the file, until somebody deletes it."""
    url = f"/org/clip/resolve/main/{name}"
    hub.files |= {url: "/login" if redirected else page, "/login": page}
    with pytest.raises(OSError) as caught:
        files.hub("org/clip", name)
    message = str(caught.value)
    assert not isinstance(caught.value, FileNotFoundError)
    assert hub.url + url in message and str(cache / "hub/org/clip" / name) in message
    assert "web page" in message and page.split()[0].decode() in message
    assert "\n" not in message and "hf_secret" not in message
    assert not left(cache)
    hub.files[url] = b'{"a": 1}'
    assert files.hub("org/clip", name).read_bytes() == b'{"a": 1}'


@pytest.fixture
def no_length(monkeypatch):
    """Makes the servers send no Content-Length: nothing but the end of the connection tells the length."""
    send = Handler.send_header
    monkeypatch.setattr(Handler, "send_header", lambda self, key, value: (
        None if key == "Content-Length" else send(self, key, value)))


INDEX = json.dumps(dict(weight_map={f"layers.{i}": "model-00001-of-00002.safetensors" for i in range(900)}))


@pytest.mark.parametrize("keep", [1, 100, len(INDEX) - 1])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tokenizer.json"])
def test_cut_json_of_unknown_length_is_refused(hub, cache, token, no_length, name, keep):
    """Catches: Half of a file is kept, since the server did not say how long it is."""
    url = f"/org/clip/resolve/main/{name}"
    hub.files[url] = INDEX[:keep].encode()
    with pytest.raises(OSError, match=name) as caught:
        files.hub("org/clip", name)
    assert "\n" not in str(caught.value) and "hf_secret" not in str(caught.value)
    assert not left(cache)
    hub.files[url] = INDEX.encode()
    assert files.hub("org/clip", name).read_text() == INDEX


@pytest.mark.parametrize("content", [b"Access denied", b"\xff\xfe\x00", b"{'a': 1}", b"{} {}",
                                     b"[" * 100_000], ids=lambda content: repr(content[:12]))
def test_what_is_not_json_is_not_kept_as_json(hub, cache, content):
    hub.files[CONFIG] = content
    with pytest.raises(OSError, match=CONFIG):
        files.hub("org/clip", "config.json")
    assert not left(cache)


@pytest.mark.parametrize("content", [b"{}", b" [1, 2]\n", b"null", b'"<html>"', "\"Grüße …\"".encode()])
def test_json_arrives_as_it_was_sent(hub, no_length, content):
    """Catches: Files that are in order are refused, or lose the bytes that the check has read."""
    hub.files[CONFIG] = content
    assert files.hub("org/clip", "config.json").read_bytes() == content


@pytest.mark.parametrize("content", [b"{not json", b"a <html> tag\n", b"<unk>\n<s>\n", bytes(300), b"<"])
def test_other_files_are_not_read_as_json(hub, content):
    """Catches: Class names, merges of tokens, or weights are refused since they are no JSON."""
    hub.files["/org/clip/resolve/main/classnames.txt"] = content
    assert files.hub("org/clip", "classnames.txt").read_bytes() == content


@pytest.mark.parametrize("answer", [500, 403, "http://127.0.0.1:9/x", "http://[", "ftp://127.0.0.1:9/x",
                                    "file:///etc/hostname", "/org/clip/resolve/main/config.json", b"<html>"])
def test_no_error_quotes_the_token(hub, token, cache, capfd, answer):
    """Catches: The message of a failed redirect shows the headers of its request."""
    hub.files[CONFIG] = answer
    with pytest.raises(OSError, match=CONFIG) as caught:
        files.hub("org/clip", "config.json")
    assert "hf_secret" not in f"{caught.value!r} {caught.value.__cause__!r}" + "".join(capfd.readouterr())
    assert not left(cache)


@pytest.mark.parametrize("value", ["hf_secret hf_other", "hf_secret\nX-Header: 1", "hf_secret\tx",
                                   "hf_secret…"])
def test_no_error_quotes_a_token_that_no_header_can_hold(hub, monkeypatch, cache, value):
    monkeypatch.setenv("HF_TOKEN", value)
    with pytest.raises((ValueError, OSError)) as caught:
        files.hub("org/clip", "config.json")
    assert "hf_secret" not in str(caught.value)
    assert not hub.seen and not left(cache)


# The lock

def test_lock_lets_one_in_at_a_time():
    """Catches: Processes that start together all download the same file."""
    entered, release, order = threading.Event(), threading.Event(), []

    def first():
        with files.lock():
            entered.set()
            release.wait(10)
            order.append("first")

    def second():
        with files.lock():
            order.append("second")

    threads = [threading.Thread(target=f) for f in (first, second)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    threads[1].join(0.1)  # waits for the first
    assert threads[1].is_alive()
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]
