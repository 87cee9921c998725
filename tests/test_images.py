"""Data sets: the drawn shapes, the readers, their cache, the pixel work, and what damaged files lead to."""
import colorsys
import hashlib
import io
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
from conftest import COLOURS, REFUSED, pairs, png, tar_bytes, write_webdataset
from PIL import Image

from data import images
from models.tokenizer import clip_tokens

CLASSES = list(COLOURS)
TEMPLATES = ["a photo of a {c}.", "something {c}."]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(images, "COUNTS", dict(captioned=512, train=128, test=512))


def solid(label):
    return torch.tensor(COLOURS[CLASSES[label]], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)


def no_pack(monkeypatch):
    """From here on a data set can only come from the cache."""
    monkeypatch.setattr(images, "pack", lambda *args: pytest.fail("read again in spite of the cache"))


# The drawn shapes

def test_shapes_are_a_pure_function(few, cache, monkeypatch):
    """Pictures drawn from the global random state: a reward's numbers then change with every cache."""
    first = images.load("shapes", "train", 32)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    monkeypatch.setattr(images, "CACHE", cache / "another")
    again = images.load("shapes", "train", 32)
    assert len(first.classes) >= 40 and len(set(first.classes)) == len(first.classes)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert first.captions == again.captions
    assert len(first.images.flatten(1).unique(dim=0)) == len(first.images)
    assert not torch.equal(first.images, images.load("shapes", "test", 32).images[:128])


def test_shapes_change_their_look(few):
    """Without a difference between captioned and labelled images there is nothing for a reward to learn."""
    hue = {}
    for split in ("captioned", "train", "test"):
        data = images.load("shapes", split, 32)
        for colour in images.HUES:
            mine = [i for i, label in enumerate(data.labels) if data.classes[label].split()[0] == colour]
            mean = data.images[mine].float().mean((0, 2, 3)).tolist()
            hue[split, colour] = 360 * colorsys.rgb_to_hsv(*mean)[0]
    for colour, degrees in images.HUES.items():
        for split, light in dict(captioned=0, train=images.LIGHT, test=images.LIGHT).items():
            assert abs((hue[split, colour] - degrees - light + 180) % 360 - 180) < 10, (split, colour)


def test_shapes_captions_are_vague_or_wrong(few):
    """Perfect captions leave a base nothing to be taught, captions of other images nothing to learn."""
    data = images.load("shapes", "captioned", 32)
    right = vague = 0
    for label, caption in zip(data.labels, data.captions, strict=True):
        colour, form = data.classes[label].split()
        right += f" {colour} {form}" in caption
        vague += not any(f" {name}" in caption for name in data.classes)
    assert 0.35 < right / 512 < 0.62 and 0.3 < vague / 512 < 0.5
    assert right + vague < 512 * 0.95


# WebDataset folders, local and on the hub

def check(data, labels):
    assert data.classes == CLASSES and data.templates == TEMPLATES and data.captions == []
    assert data.labels.tolist() == labels and data.images.dtype == torch.uint8
    assert all(torch.equal(image, solid(label)) for image, label in zip(data.images, labels, strict=True))


def test_webdataset_folder(tmp_path, monkeypatch):
    """Labels that come apart from their images, a lost shard, a cache that is not used or not renewed."""
    root = write_webdataset(tmp_path / "data")
    check(images.load(str(root), "train", 32), [0, 1, 2, 0, 1, 2, 2, 1, 0])
    check(images.load(str(root), "test", 32), [0, 1, 2])
    with monkeypatch.context() as patch:
        no_pack(patch)
        check(images.load(str(root), "train", 32), [0, 1, 2, 0, 1, 2, 2, 1, 0])
        check(images.load(str(root), "test", 32), [0, 1, 2])
        with pytest.raises(pytest.fail.Exception):
            images.load(str(root), "test", 16)
    (root / "test" / "0.tar").write_bytes(tar_bytes(pairs([2, 1, 0]))[0])  # as long as before
    check(images.load(str(root), "test", 32), [2, 1, 0])


def test_cache_serves_every_spelling_of_a_folder(tmp_path, monkeypatch):
    """A relative path, or one with a slash behind it, read again."""
    root = write_webdataset(tmp_path / "data")
    images.load(str(root), "test", 32)
    no_pack(monkeypatch)
    for spelling in (f"{root}/", os.path.relpath(root)):
        check(images.load(spelling, "test", 32), [0, 1, 2])


def test_webdataset_members_in_any_order(tmp_path):
    """A .cls file behind its image, folders inside the tar, other files beside them."""
    root = write_webdataset(tmp_path / "data")
    members = [*reversed(pairs([2, 0, 1])), ("s0.json", b"{}")]
    (root / "test" / "0.tar").write_bytes(tar_bytes([(f"deep/{name}", data) for name, data in members])[0])
    check(images.load(str(root), "test", 32), [1, 0, 2])


@pytest.mark.parametrize("source, repo", [("org/name", "org/name"),
                                          ("caltech101", "clip-benchmark/wds_vtab-caltech101")])
def test_webdataset_on_the_hub(tmp_path, serve, monkeypatch, source, repo):
    """A wrong address, the same file fetched twice, or a second run that needs the network."""
    root, server = write_webdataset(tmp_path / "data"), serve()
    server.files = {f"/datasets/{repo}/resolve/main/{f.relative_to(root)}": f.read_bytes()
                    for f in root.rglob("*") if f.is_file()}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    check(images.load(source, "train", 32), [0, 1, 2, 0, 1, 2, 2, 1, 0])
    check(images.load(source, "test", 32), [0, 1, 2])
    assert sorted(path for path, _ in server.seen) == sorted(server.files)
    no_pack(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    check(images.load(source, "test", 32), [0, 1, 2])


def test_hub_without_network(monkeypatch, cache):
    """The message must say what to fetch and where to put it."""
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    with pytest.raises(OSError) as caught:
        images.load("flowers", "test", 32)
    name = "datasets/clip-benchmark/wds_vtab-flowers"
    assert f"{REFUSED}/{name}/resolve/main/classnames.txt" in str(caught.value)
    assert str(cache / "hub" / name / "classnames.txt") in str(caught.value)


# Folders of images

def write_folder(root, **splits):
    for split, classes in splits.items():
        for name, files in classes.items():
            (root / split / name).mkdir(parents=True)
            for file, data in files.items():
                (root / split / name / file).write_bytes(data)
    return root


RED, GREEN, BLUE = (png(colour) for colour in COLOURS.values())


def test_folder(tmp_path):
    """Underscores that reach the prompts, splits numbered differently, other files taken for images."""
    root = write_folder(
        tmp_path / "data", train=dict(deep_red={"a.png": RED, "b.PNG": RED}, blue={"a.png": BLUE}),
        test=dict(deep_red={"a.png": RED, "notes.txt": b""}, blue={"b.png": BLUE, "a.png": BLUE}))
    train, test = (images.load(str(root), split, 32) for split in ("train", "test"))
    assert train.classes == test.classes == ["blue", "deep red"]
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 0, 1]
    assert torch.equal(test.images[2], solid(0)) and torch.equal(test.images[0], solid(2))
    assert train.templates == ["a photo of a {c}."]
    (root / "zeroshot_classification_templates.txt").write_text("a {c}.\n\n the {c}. \n")
    assert images.load(str(root), "train", 32).templates == ["a {c}.", "the {c}."]


# CIFAR-100

@pytest.fixture
def archive(tmp_path, monkeypatch):
    """CIFAR-100's archive in small, and the hash that belongs to it."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)

    def table(rows, labels):
        data = pixels[rows].reshape(len(labels), -1)
        return {b"data": data, b"fine_labels": labels, b"coarse_labels": [1 - label for label in labels]}

    names = {b"fine_label_names": [b"apple", b"aquarium_fish"], b"coarse_label_names": [b"food", b"fish"]}
    members = dict(meta=names, train=table(slice(4), [0, 1, 1, 0]), test=table(slice(4, 6), [1, 0]))
    plain, _ = tar_bytes([(f"cifar-100-python/{n}", pickle.dumps(value)) for n, value in members.items()])
    path = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar, tarfile.open(fileobj=io.BytesIO(plain)) as source:
        for member in source:
            tar.addfile(member, source.extractfile(member))
    monkeypatch.setattr(images, "CIFAR_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, torch.from_numpy(pixels)


def test_cifar100(archive, cache):
    """Colours or rows mixed up by the archive's planar layout; coarse labels in place of the fine ones."""
    path, pixels = archive
    train, test = (images.load(str(path), split, 32) for split in ("train", "test"))
    assert torch.equal(train.images, pixels[:4]) and torch.equal(test.images, pixels[4:])
    assert train.labels.tolist() == [0, 1, 1, 0] and test.labels.tolist() == [1, 0]
    assert train.classes == ["apple", "aquarium fish"]
    assert len(set(train.templates)) == 18 and all(t.count("{c}") == 1 for t in train.templates)
    assert {"a photo of a {c}.", "a bad photo of the {c}.", "a photo of the big {c}."} <= set(train.templates)
    cache.mkdir(exist_ok=True)
    path.rename(cache / path.name)
    assert torch.equal(images.load("cifar100", "test", 32).images, pixels[4:])  # by name, from the cache


@pytest.mark.parametrize("by_name", [False, True])
def test_cifar100_of_another_hash_is_not_unpickled(archive, cache, monkeypatch, by_name):
    """A pickle runs whatever it asks for: nothing of a changed archive may be opened."""
    path, _ = archive
    path.write_bytes(path.read_bytes() + b"\0")
    if by_name:
        cache.mkdir()
        path = path.rename(cache / path.name)
    for opener in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, opener, lambda *args, **options: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=f"{path}.*sha256"):
        images.load("cifar100" if by_name else str(path), "train", 32)


def test_cifar100_without_network(cache):
    with pytest.raises(OSError) as caught:
        images.load("cifar100", "train", 32)
    for word in (images.CIFAR_URL, str(cache / "cifar-100-python.tar.gz")):
        assert word in str(caught.value)


# Pixels

@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (33, 32), (31, 33), (7, 5), (1, 9), (300, 3)])
def test_resize_crop(shape):
    """A squeezed aspect ratio, an off-centre crop, another filter: points lost in silence."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    out = images.resize_crop(image, 32)
    short = min(shape)
    w, h = (32 if side == short else int(32 * side / short) for side in shape)
    resized = image.resize((w, h), Image.BICUBIC)
    left, top = int(round((w - 32) / 2.0)), int(round((h - 32) / 2.0))
    want = torch.from_numpy(np.array(resized)[top: top + 32, left: left + 32]).permute(2, 0, 1)
    assert out.shape == (3, 32, 32) and out.dtype == torch.uint8 and torch.equal(out, want)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_resize_crop_of_other_modes(mode):
    """Greyscale and palette files give one channel, or fail, where they are not converted."""
    image = Image.new(mode, (20, 10), 1)
    assert images.resize_crop(image, 8).shape == (3, 8, 8)


def ramp():
    return torch.arange(0, 256, 8).float().expand(3, 32, 32)


def test_augment():
    """One crop for the whole batch, randomness from the global state, crops outside 50 to 100%."""
    batch = ramp().to(torch.uint8).repeat(512, 1, 1, 1)
    make = torch.Generator().manual_seed
    out = images.augment(batch, make(3))
    assert out.shape == batch.shape and out.dtype == torch.uint8
    torch.manual_seed(9)
    assert torch.equal(out, images.augment(batch, make(3)))
    assert not torch.equal(out, images.augment(batch, make(4)))
    assert len(out.flatten(1).unique(dim=0)) > 400  # a crop of its own for each image
    assert (out.float().mean() - batch.float().mean()).abs() < 3
    row = out[:, 0, 16].float()
    flipped, width = row[:, 0] > row[:, -1], (row[:, 0] - row[:, -1]).abs() / 248  # the side of the crop
    assert 0.4 < flipped.float().mean() < 0.6
    assert 0.68 < width.min() < 0.73 and 0.97 < width.max() <= 1
    solid = torch.full((4, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(images.augment(solid, make(0)), solid)


# Texts

def test_prompts_and_captions():
    """Prompts of one class under another, or a caption of the wrong image."""
    prompts = images.prompts(CLASSES, TEMPLATES)
    assert prompts.shape[:2] == (3, 2) and prompts.shape[2] < 12
    for tokens, name in zip(prompts, CLASSES):
        texts = clip_tokens([f"a photo of a {name}.", f"something {name}."])
        assert torch.equal(tokens, texts[:, : tokens.shape[1]]) and not texts[:, tokens.shape[1]:].any()
    data = images.Images(None, torch.tensor([2, 0]), CLASSES, TEMPLATES, [])
    assert torch.equal(images.captions(data), prompts[[2, 0]])
    own = images.captions(data._replace(captions=["blue thing", "a much longer text about something red"]))
    assert own.shape[:2] == (2, 1) and own[0, 0, :4].tolist() == clip_tokens(["blue thing"])[0, :4].tolist()
    assert (own.argmax(-1).flatten() == torch.tensor([3, 8])).all() and own.shape[2] == 9


# Damaged and missing files: the error names what to mend

TAR, OFFSETS = tar_bytes(pairs([0, 1, 2]))
BLANK = tar_bytes([*pairs([0]), ("s1.cls", b"1"), ("s1.bmp", bytes(4096)), *pairs([0, 1, 2])[4:]])
DIRECTORY = tar_bytes([("empty", b""), *pairs([0, 1, 2])])
TARS = {
    "empty": b"",
    "no tar": b"not a tar, " * 200,
    "in the first header": TAR[:100],
    "in a later header": TAR[: OFFSETS[2] + 100],
    "in an image": TAR[: OFFSETS[3] + 512 + 20],
    "after a .cls": TAR[: OFFSETS[3]],
    "after a pair": TAR[: OFFSETS[2]],
    "before the end mark": TAR[: OFFSETS[6]],
    "after 512 bytes": DIRECTORY[0][:512],
    "after an image that ends in zeros": BLANK[0][: BLANK[1][4]],
    "damaged header": TAR[: OFFSETS[4]] + b"\xff" + TAR[OFFSETS[4] + 1:],
    "zeros in the middle": TAR[: OFFSETS[2]] + bytes(1024) + TAR[OFFSETS[2] + 1024:],
}


@pytest.mark.parametrize("cut", TARS)
def test_damaged_tar(tmp_path, cut):
    """tarfile ends quietly at a cut or a damaged header: the rest of the images is then missing."""
    root = write_webdataset(tmp_path / "data")
    (root / "test" / "0.tar").write_bytes(TARS[cut])
    with pytest.raises(ValueError, match="0.tar") as caught:
        images.load(str(root), "test", 32)
    assert "no image of class" not in str(caught.value)


def corrupt(data):
    return data[:45] + bytes(b ^ 255 for b in data[45:])


MEMBERS = {
    "damaged image": ([("s0.cls", b"0"), ("s0.png", corrupt(RED))], r"0\.tar: s0\.png"),
    "cut image": ([("s0.cls", b"0"), ("s0.png", RED[:60])], r"0\.tar: s0\.png"),
    "no image": ([("s0.cls", b"0"), ("s0.jpg", b"<html>")], r"0\.tar: s0\.jpg"),
    "empty image": ([("s0.cls", b"0"), ("s0.webp", b"")], r"0\.tar: s0\.webp"),
    "missing .cls": ([("s0.png", RED)], r"0\.tar: s0\.png"),
    "label is no number": ([("s0.cls", b"red"), ("s0.png", RED)], r"0\.tar: s0\.cls"),
    "label is empty": ([("s0.cls", b""), ("s0.png", RED)], r"0\.tar: s0\.cls"),
    "negative label": ([("s0.cls", b"-1"), ("s0.png", RED)], r"0\.tar: s0\.cls"),
    "label out of range": ([("s0.cls", b"3"), ("s0.png", RED)], r"0\.tar: s0\.png.*3"),
    "label beyond 64 bits": ([("s0.cls", b"9" * 20), ("s0.png", RED)], r"0\.tar: s0\.png.*999"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_damaged_member(tmp_path, case):
    """One bad file among thousands: which one?"""
    members, words = MEMBERS[case]
    root = write_webdataset(tmp_path / "data")
    good = [(f"good{name}", data) for name, data in pairs([0, 1, 2])]
    (root / "test" / "0.tar").write_bytes(tar_bytes(good + members)[0])
    with pytest.raises(ValueError, match=words):
        images.load(str(root), "test", 32)
    assert not list(images.CACHE.rglob("*test*"))


@pytest.mark.parametrize("file, content", [
    ("test/nshards.txt", b""), ("test/nshards.txt", b"many"), ("test/nshards.txt", None),
    ("test/0.tar", None), ("classnames.txt", b"\xff\xfe"), ("zeroshot_classification_templates.txt", None)])
def test_damaged_webdataset_folder(tmp_path, file, content):
    """A list that is empty, garbled or missing."""
    path = write_webdataset(tmp_path / "data") / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=file):
        images.load(str(tmp_path / "data"), "test", 32)


def test_class_without_images(tmp_path):
    """A class that no image shows has no accuracy, and shifts nothing else: most likely files are missing."""
    root = write_webdataset(tmp_path / "data")
    (root / "test" / "0.tar").write_bytes(tar_bytes(pairs([0, 2]))[0])
    with pytest.raises(ValueError, match="data.*green"):
        images.load(str(root), "test", 32)
    for file in (root / "test").glob("*"):
        file.write_text("0" if file.suffix == ".txt" else "")
    with pytest.raises(ValueError, match="data.*test split"):
        images.load(str(root), "test", 32)


BOTH = dict(red={"a.png": RED}, blue={"a.png": BLUE})
FOLDERS = {
    "empty class": (BOTH | dict(blue={}), BOTH, "train", "blue"),
    "class that test lacks": (BOTH, dict(red={"a.png": RED}), "test", "blue"),
    "class that train lacks": (dict(red={"a.png": RED}), BOTH, "test", "blue"),
    "no test split": (BOTH, {}, "test", "data/test"),
    "damaged image": (dict(red={"a.png": RED[:60]}), {}, "train", "red/a.png"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folder(tmp_path, case):
    """Splits that do not belong together would give every class another number."""
    train, test, split, words = FOLDERS[case]
    root = write_folder(tmp_path / "data", train=train, test=test)
    with pytest.raises((ValueError, OSError), match=words):
        images.load(str(root), split, 32)


@pytest.mark.parametrize("source", ["shapez", "no/such/dir", "/nothing", "nothing/", "./nothing", "../no"])
def test_unknown_source(source, serve, monkeypatch):
    """A mistyped path looked up on the hub: the message then speaks of the network."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(ValueError, match="caltech101") as caught:
        images.load(source, "test", 32)
    assert source in str(caught.value) and not server.seen


def test_damaged_cache(tmp_path):
    """A cache file cut by a crash: the message must say that it can go."""
    root = write_webdataset(tmp_path / "data")
    images.load(str(root), "test", 32)
    file, = images.CACHE.rglob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file}.*delete it"):
        images.load(str(root), "test", 32)
