"""Bytes in and out (data/files.py): safetensors, torch files, atomic writes, downloads, the lock."""
import threading
from pathlib import Path

import pytest
import torch
from conftest import REFUSED
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
