"""Image data sets: the drawn shapes, the readers and their cache, resizing, prompts, and damaged files."""
import codecs
import colorsys
import functools
import hashlib
import io
import os
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLORS, pairs, png, tar_bytes, write_cifar100, write_webdataset
from PIL import Image

from data import images, shapes
from data.clip_tokenizer import clip_tokens

CLASSES = list(COLORS)
TEMPLATES = ["a photo of a {c}.", "something {c}."]
TRAIN, TEST = [0, 1, 2, 0, 1, 2, 2, 1, 0], [0, 1, 2]  # the labels in write_webdataset's splits
RED, GREEN, BLUE = (png(color) for color in COLORS.values())


def check(data, labels, classes=CLASSES, templates=TEMPLATES):
    """The classes, templates, labels, and pixels are those of a folder of `write_webdataset`."""
    assert (data.classes, data.templates, data.captions) == (classes, templates, [])
    assert data.labels.tolist() == labels
    colors = torch.tensor([COLORS[classes[label].split()[-1]] for label in labels], dtype=torch.uint8)
    assert torch.equal(data.images, colors.view(-1, 3, 1, 1).expand(-1, 3, 32, 32))


@pytest.fixture
def root(tmp_path):
    """A folder in clip-benchmark's layout, with one solid color per class."""
    return write_webdataset(tmp_path / "data")


def use_the_cache_only(monkeypatch):
    """From here on, every data set that is not in the cache fails the test."""
    monkeypatch.setattr(images, "pack", lambda *args: pytest.fail("read again in spite of the cache"))


# The drawn shapes

FEW = dict(captioned=512, train=128, test=512)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The splits of the drawn shapes, by name, with fewer pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "COUNTS", FEW)
        patch.setattr(files, "CACHE", tmp_path_factory.mktemp("shapes"))
        return {split: images.load("shapes", split, 32) for split in FEW}


def test_the_shapes_do_not_depend_on_the_global_random_state(drawn, monkeypatch):
    """Catches: Pictures are drawn from the global random state, and differ after every deleted cache."""
    monkeypatch.setattr(images, "COUNTS", FEW)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    for one, other in zip(drawn["train"], images.load("shapes", "train", 32)):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_no_two_pictures_are_alike(drawn):
    pictures = torch.cat([data.images for data in drawn.values()]).flatten(1)
    assert len(pictures.unique(dim=0)) == len(pictures) == 1152


# The mean colors of one picture of every color and form, and the first captions, of this version.
VERSION = 2
MEANS = [(181, 149, 158), (116, 103, 90), (112, 113, 106), (127, 173, 142), (73, 95, 93), (85, 84, 96),
         (167, 119, 170), (123, 86, 122)]
CAPTIONS = ["a photo of a red thing.", "a picture of a red square.", "a picture of a red thing."]


def test_the_pictures_change_only_with_their_version(drawn):
    """Catches: VERSION is left as it is, and pictures of older code are read from the cache.

    Means leave room for other versions of Pillow and NumPy. A change of the pictures updates these values.
    """
    assert images.VERSION == VERSION
    difference = drawn["train"].images[:64:9].float().mean((2, 3)) - torch.tensor(MEANS).float()
    assert difference.abs().max() < 2
    assert drawn["train"].captions[:3] == CAPTIONS
    assert len(set(drawn["train"].classes)) == 64


@pytest.mark.parametrize("split, light", [("captioned", 0), ("train", shapes.LIGHT), ("test", shapes.LIGHT)])
def test_colored_light_shifts_every_hue_of_the_labeled_pictures(drawn, split, light):
    """Catches: Captioned and labeled pictures look alike, so that a reward has nothing to learn."""
    data = drawn[split]
    for color, degrees in shapes.HUES.items():
        chosen = [i for i, label in enumerate(data.labels) if data.classes[label].split()[0] == color]
        hue = 360 * colorsys.rgb_to_hsv(*data.images[chosen].float().mean((0, 2, 3)).tolist())[0]
        assert abs((hue - degrees - light + 180) % 360 - 180) < 10, color


def test_the_captions_are_often_vague_or_wrong(drawn):
    """Catches: Captions are perfect and leave nothing to teach to a base, or belong to other pictures."""
    data = drawn["captioned"]
    names = [data.classes[label] for label in data.labels]
    right = sum(f" {name}" in caption for name, caption in zip(names, data.captions, strict=True))
    vague = sum(not any(f" {name}" in caption for name in data.classes) for caption in data.captions)
    assert 0.35 < right / 512 < 0.62
    assert 0.3 < vague / 512 < 0.5
    assert right + vague < 512 * 0.95


# WebDataset folders, local and on the Hub

@pytest.mark.parametrize("spell", [str, lambda path: f"{path}/", os.path.relpath],
                         ids=["absolute", "slash", "relative"])
def test_a_webdataset_folder_holds_its_images_and_is_read_once(root, monkeypatch, spell):
    """Catches: Images have the labels of others, a shard is lost, or the cache serves another split."""
    check(images.load(str(root), "train", 32), TRAIN)
    check(images.load(str(root), "test", 32), TEST)
    use_the_cache_only(monkeypatch)
    check(images.load(spell(root), "train", 32), TRAIN)
    check(images.load(spell(root), "test", 32), TEST)


def replace_test_images(root, members):
    (root / "test/0.tar").write_bytes(tar_bytes(members)[0])
    return root


@pytest.mark.parametrize("size, version, labels", [(16, 2, TEST), (32, 3, TEST), (32, 2, [2, 1, 0])],
                         ids=["size", "version", "files"])
def test_the_cache_serves_no_other_size_version_or_files(root, monkeypatch, size, version, labels):
    """Catches: After a change of the code, or of a file by one of the same length, old tensors are used."""
    images.load(str(root), "test", 32)
    use_the_cache_only(monkeypatch)
    monkeypatch.setattr(images, "VERSION", version)
    if labels != TEST:
        replace_test_images(root, pairs(labels))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        images.load(str(root), "test", size)


def test_a_damaged_cache_file_is_made_again(root, cache):
    images.load(str(root), "test", 32)
    file, = cache.rglob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(2):  # made again, and read
        check(images.load(str(root), "test", 32), TEST)
    assert file.stat().st_size > 100


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_cached_images_lie_in_a_private_mapping_of_their_file(root, cache):
    """Catches: A data set that is larger than the memory is read as a whole, or training changes its file."""
    _, data = (images.load(str(root), "test", 32) for _ in range(2))
    file, = cache.rglob("*.pt")
    (span, mode), = (line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()
                     if file.name in line)
    low, high = (int(end, 16) for end in span.split("-"))
    assert low < data.images.data_ptr() < high
    assert "s" not in mode


def test_the_members_of_a_tar_may_have_any_order(root):
    """Catches: A .cls file is not found after its image or in a folder, or a .json is read as an image."""
    members = [*reversed(pairs([2, 0, 1])), ("s0.json", b"{}")]
    replace_test_images(root, [(f"deep/{name}", data) for name, data in members])
    check(images.load(str(root), "test", 32), [1, 0, 2])


def test_text_files_may_come_from_windows(root):
    """Catches: A byte-order mark becomes a part of the first class name, and so of its prompts."""
    for path in root.rglob("*.txt"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    check(images.load(str(root), "test", 32), TEST)


@pytest.mark.parametrize("source, repo", [("org/name", "org/name"),
                                          ("caltech101", "clip-benchmark/wds_vtab-caltech101")])
def test_every_file_of_a_data_set_on_the_hub_is_downloaded_once(root, serve, monkeypatch, source, repo):
    """Catches: The address is wrong, or a file is downloaded again for a split, or in spite of the cache."""
    server = serve()
    server.files = {f"/datasets/{repo}/resolve/main/{file.relative_to(root)}": file.read_bytes()
                    for file in root.rglob("*") if file.is_file()}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for split, labels in (("train", TRAIN), ("test", TEST), ("train", TRAIN)):
        check(images.load(source, split, 32), labels)
    assert sorted(path for path, _ in server.seen) == sorted(server.files)


@pytest.mark.parametrize("source", ["shapez", "no/such/dir", "/nothing", "./nothing"])
def test_the_error_for_an_unknown_source_lists_what_there_is(source):
    """Catches: A mistyped path is looked up on the hub and gives an error about the network."""
    with pytest.raises(ValueError, match=f"--data {source}: unknown.*caltech101"):
        images.load(source, "test", 32)


# Folders of images

def write_folder(root, **splits):
    """Writes root/SPLIT/CLASS/FILE from split -> class -> file -> bytes."""
    for split, classes in splits.items():
        for name, contents in classes.items():
            (root / split / name).mkdir(parents=True)
            for file, data in contents.items():
                (root / split / name / file).write_bytes(data)
    return root


@pytest.mark.parametrize("file, templates", [(None, ["a photo of a {c}."]),
                                             ("a {c}.\n\n the {c}. \n", ["a {c}.", "the {c}."])])
def test_both_splits_of_a_folder_number_their_classes_alike(tmp_path, file, templates):
    """Catches: Underscores reach the prompts, other files are taken for images, or splits differ."""
    root = write_folder(
        tmp_path / "photos", train=dict(deep_red={"a.png": RED, "b.PNG": RED}, blue={"a.png": BLUE}),
        test=dict(deep_red={"a.png": RED, "notes.txt": b""}, blue={"b.png": BLUE, "a.png": BLUE}))
    if file:
        (root / "zeroshot_classification_templates.txt").write_text(file)
    for split, labels in dict(train=[0, 1, 1], test=[0, 0, 1]).items():
        check(images.load(str(root), split, 32), labels, ["blue", "deep red"], templates)


# CIFAR-100

@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's form, whose hash the code now expects, and its pixels."""
    path, pixels = write_cifar100(tmp_path / "cifar-100-python.tar.gz")
    monkeypatch.setattr(images, "CIFAR_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, torch.from_numpy(pixels)


@pytest.mark.parametrize("split, part, labels", [("train", slice(4), [0, 1, 1, 0]),
                                                 ("test", slice(4, 6), [1, 0])])
def test_cifar100_holds_its_images_with_their_fine_labels(archive, split, part, labels):
    """Catches: Colors or rows are mixed up, labels are the coarse ones, or 224 pixels a side are kept."""
    path, pixels = archive
    data = images.load(str(path), split, 224)
    assert torch.equal(data.images, pixels[part])
    assert data.labels.tolist() == labels
    assert data.classes == ["apple", "aquarium fish"]
    assert len(set(data.templates)) == 18
    assert all(template.count("{c}") == 1 for template in data.templates)
    assert {"a photo of a {c}.", "a bad photo of the {c}.", "a photo of the big {c}."} <= {*data.templates}


def test_cifar100_is_downloaded_from_its_page_or_read_from_the_cache(archive, cache):
    path, pixels = archive
    with pytest.raises(OSError, match=images.CIFAR_URL):
        images.load("cifar100", "test", 32)
    cache.mkdir(exist_ok=True)
    path.rename(cache / path.name)
    assert torch.equal(images.load("cifar100", "test", 32).images, pixels[4:])


@pytest.mark.parametrize("by_name", [False, True])
def test_cifar100_of_another_hash_is_not_unpickled(archive, cache, monkeypatch, by_name):
    """Catches: Code in a changed archive runs, since a pickle may call anything."""
    path, _ = archive
    path.write_bytes(path.read_bytes() + b"\0")
    if by_name:
        cache.mkdir()
        path = path.rename(cache / path.name)
    for opener in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, opener, lambda *args, **options: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=f"{path}.*sha256"):
        images.load("cifar100" if by_name else str(path), "train", 32)


# Pixels

def picture(seed, size=(20, 20)):
    """Returns a PIL image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (35, 32), (31, 33), (1, 9)])
def test_an_image_is_resized_on_its_short_side_and_cropped_at_the_center(shape):
    """Catches: Another aspect ratio, crop, or filter silently costs accuracy."""
    image, short = picture(1, shape), min(shape)
    w, h = (32 if side == short else int(32 * side / short) for side in shape)
    left, top = int(round((w - 32) / 2.0)), int(round((h - 32) / 2.0))
    want = tensor(image.resize((w, h), Image.BICUBIC))[:, top: top + 32, left: left + 32]
    out = images.resize_crop(image, 32)
    assert out.dtype == torch.uint8
    assert torch.equal(out, want)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_an_image_of_any_mode_becomes_rgb(mode):
    """Catches: Gray and palette files give one channel, or fail."""
    assert images.resize_crop(Image.new(mode, (20, 10), 1), 8).shape == (3, 8, 8)


RAMP = torch.arange(0, 256, 8, dtype=torch.uint8).expand(512, 1, 32, 32)  # brighter from left to right
RAMPS = torch.cat([RAMP, RAMP.mT, RAMP], 1)  # the green channel from top to bottom


def crops(seed):
    return images.augment(RAMPS, torch.Generator().manual_seed(seed))


def test_the_generator_alone_decides_how_images_are_augmented():
    """Catches: Crops come from the global random state, which a resumed run does not repeat."""
    one = crops(3)
    torch.manual_seed(9)
    assert torch.equal(one, crops(3))
    assert not torch.equal(one, crops(4))


def test_a_crop_has_50_to_100_percent_of_the_area_and_half_are_flipped():
    out = crops(3)
    assert out.shape == RAMPS.shape and out.dtype == torch.uint8
    assert len(out.flatten(1).unique(dim=0)) > 400
    assert (out.float().mean((0, 2, 3)) - RAMPS.float().mean((0, 2, 3))).abs().max() < 3
    across, down = out[:, 0, 16].float(), out[:, 1, :, 16].float()
    assert 0.4 < (across[:, 0] > across[:, -1]).float().mean() < 0.6
    width, height = (across[:, -1] - across[:, 0]).abs() / 248, (down[:, -1] - down[:, 0]) / 248
    assert 0.68 < width.min() < 0.73 and 0.97 < width.max() <= 1
    assert (width - height).abs().max() < 0.02


def test_a_crop_of_one_color_keeps_the_color():
    """Catches: The border of a crop is filled with black."""
    gray = torch.full((4, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(images.augment(gray, torch.Generator().manual_seed(0)), gray)


# Images at their own size, read by threads

def write_pictures(root, sizes):
    """Writes pictures of these sizes as the test split of three classes; returns them as a list."""
    pictures, members = [picture(i, size) for i, size in enumerate(sizes)], []
    for i, image in enumerate(pictures):
        image.save(file := io.BytesIO(), "PNG")
        members += [(f"{i}.cls", str(i % 3).encode()), (f"{i}.png", file.getvalue())]
    replace_test_images(root, members)
    return pictures


SQUARES = [(20, 20)] * 4


@pytest.mark.parametrize("sizes, kept", [
    (SQUARES, True), ([(1, 1)] * 4, True), ([(31, 31)] * 4, True), ([(40, 40)] * 4, False),
    ([(24, 20)] * 4, False), ([(20, 24)] * 4, False), ([(40, 40), *SQUARES], False),
    ([(20, 24), *SQUARES], False), ([*SQUARES, (21, 21)], False), ([*SQUARES, (32, 32), *SQUARES], False)],
    ids=str)
def test_images_are_resized_unless_all_are_small_squares_of_one_size(root, sizes, kept):
    """Catches: The cache holds 50 times the bytes of CIFAR's images, or strips are squeezed to squares."""
    expected = [tensor(x) if kept else images.resize_crop(x, 32) for x in write_pictures(root, sizes)]
    data = images.load(str(root), "test", 32)
    assert torch.equal(data.images, torch.stack(expected))
    assert data.labels.tolist() == [i % 3 for i in range(len(sizes))]


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("last", [(60, 60), (64, 60)], ids=["small", "mixed"])
def test_any_number_of_threads_gives_the_same_images(root, monkeypatch, threads, last):
    """Catches: Images are in the order in which threads finish, or threads share a position in a tar."""
    monkeypatch.setattr(images, "THREADS", threads)
    pictures = write_pictures(root, [(60, 60)] * 200 + [last])
    data = images.load(str(root), "test", 64)
    expected = [tensor(x) if last == (60, 60) else images.resize_crop(x, 64) for x in pictures]
    assert torch.equal(data.images, torch.stack(expected))
    assert data.labels.tolist() == [i % 3 for i in range(201)]


def slow_pack(monkeypatch, n, threads, broken=(), odd=None, seconds=0.01):
    """Returns a function that packs n samples, each of which takes time, and the list of those opened.

    broken: those that cannot be read. odd: one of another size.
    """
    opened = []

    def open_image(i):
        opened.append(i)
        time.sleep(seconds)
        if i in broken:
            raise OSError("cannot identify image file")
        return Image.new("RGB", (80, 80) if i == odd else (60, 60), (i % 256, i // 256, 0))

    monkeypatch.setattr(images, "THREADS", threads)
    samples = [(0, f"sample {i}", functools.partial(open_image, i)) for i in range(n)]
    return lambda: images.pack("here", "train", 64, ["a"], [], samples), opened


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("first", [0, 1, 14])
def test_the_first_unreadable_image_is_named_at_once(monkeypatch, threads, first):
    """Catches: The error comes only after all other images were read, or from the fastest thread."""
    pack, opened = slow_pack(monkeypatch, 2_000, threads, broken=(first, first + 2, 38))
    with pytest.raises(ValueError, match=f"^sample {first}: not a readable image.*cannot identify"):
        pack()
    assert len(opened) < 200


def test_images_are_read_at_the_same_time(monkeypatch):
    """Catches: Threads wait for one another, so that a large data set takes hours."""
    pack, _ = slow_pack(monkeypatch, 80, 8, seconds=0.02)
    start = time.perf_counter()
    assert pack().images[:, 0, 0, 0].tolist() == list(range(80))
    assert time.perf_counter() - start < 1  # one after another they take 1.6 s


@pytest.mark.parametrize("odd", [0, 1])
def test_another_size_ends_the_first_reading_at_once(monkeypatch, odd):
    """Catches: All images are read and kept in memory once more, beside the second reading."""
    pack, opened = slow_pack(monkeypatch, 300, 2, odd=odd, seconds=0.001)
    assert pack().images.shape == (300, 3, 64, 64)
    assert len(opened) < 400


# Prompts and captions

def test_prompts_are_the_tokens_of_every_class_in_every_template():
    """Catches: Prompts of one class are found under another, or all prompts end in padding."""
    prompts = images.prompts(CLASSES, TEMPLATES)
    texts = clip_tokens([template.replace("{c}", name) for name in CLASSES for template in TEMPLATES])
    assert prompts.shape == (3, 2, 8)
    assert torch.equal(prompts.flatten(0, 1), texts[:, :8])
    assert not texts[:, 8:].any()


def test_captions_belong_to_their_images_and_default_to_the_prompts_of_their_classes():
    data = images.Images(None, torch.tensor([2, 0]), CLASSES, TEMPLATES, [])
    assert torch.equal(pretrain.caption_tokens(data), images.prompts(CLASSES, TEMPLATES)[[2, 0]])
    texts = ["blue thing", "a much longer text about something red"]
    assert torch.equal(pretrain.caption_tokens(data._replace(captions=texts)), clip_tokens(texts)[:, None, :9])


# Damaged and missing files: the error names the file to repair

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
BOTH = dict(red={"a.png": RED}, blue={"a.png": BLUE})
TAR, OFFSETS = tar_bytes(pairs([0, 1, 2]))
BLANK = tar_bytes([*pairs([0]), ("s1.cls", b"1"), ("s1.bmp", bytes(4096)), *pairs([0, 1, 2])[4:]])


def tar(*members):
    return "tars/test/0.tar", tar_bytes([*pairs([0, 1, 2]), *members])[0]


CUT = r"0\.tar: .*truncated"
DAMAGED = {  # a file, its content, and words of the message
    "no tar": ("tars/test/0.tar", b"not a tar, " * 200, CUT),
    "cut in an image": ("tars/test/0.tar", TAR[: OFFSETS[3] + 512 + 20], CUT),
    "cut before the end mark": ("tars/test/0.tar", TAR[: OFFSETS[6]], CUT),
    "cut after an image that ends in zeros": ("tars/test/0.tar", BLANK[0][: BLANK[1][4]], CUT),
    "damaged header": ("tars/test/0.tar", TAR[: OFFSETS[4]] + b"\xff" + TAR[OFFSETS[4] + 1:], CUT),
    "zeros": ("tars/test/0.tar", TAR[: OFFSETS[2]] + bytes(1024) + TAR[OFFSETS[2] + 1024:], CUT),
    "damaged image": (*tar(("x.cls", b"0"), ("x.png", RED[:60])), r"0\.tar: x\.png: not a readable image"),
    "web page": (*tar(("x.cls", b"0"), ("x.jpg", b"<html>")), r"0\.tar: x\.jpg: .*cannot identify"),
    "PostScript": (*tar(("x.cls", b"0"), ("x.jpg", POSTSCRIPT)), r"0\.tar: x\.jpg: .*cannot identify"),
    "no label": (*tar(("x.png", RED)), r"0\.tar: x\.png"),
    "label is no number": (*tar(("x.cls", b"-1"), ("x.png", RED)), r"0\.tar: x\.cls"),
    "label out of range": (*tar(("x.cls", b"3"), ("x.png", RED)), r"0\.tar: x\.png.*3"),
    "label beyond 64 bits": (*tar(("x.cls", b"9" * 20), ("x.png", RED)), r"0\.tar: x\.png.*999"),
    "no image of a class": ("tars/test/0.tar", tar_bytes(pairs([0, 2]))[0], "tars.*no image of class green"),
    "no images": ("tars/test/nshards.txt", b"0", "tars.*test split"),
    "no number of tars": ("tars/test/nshards.txt", b"many", "test/nshards.txt"),
    "missing list": ("tars/test/nshards.txt", None, "test/nshards.txt"),
    "missing tar": ("tars/test/0.tar", None, "test/0.tar"),
    "garbled names": ("tars/classnames.txt", b"\xff\xfe", "classnames.txt"),
    "class that test lacks": ("folder/test/blue", None, "folder.*no image of class blue"),
    "class that train lacks": ("folder/train/blue", None, "'blue' is not a class"),
    "missing split": ("folder/test", None, "no folder test; it needs .* test/CLASS"),
    "PostScript in a folder": ("folder/test/red/a.png", POSTSCRIPT, "red/a.png: .*cannot identify"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_or_missing_is_named_and_nothing_is_cached(tmp_path, cache, case):
    """Catches: Images are missing, since tarfile stops silently at damage, or splits have other classes."""
    file, content, words = DAMAGED[case]
    write_webdataset(tmp_path / "tars")
    write_folder(tmp_path / "folder", train=BOTH, test=BOTH)
    if content is None:
        (tmp_path / file).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        images.load(str(tmp_path / Path(file).parts[0]), "test", 32)
    assert not list(cache.rglob("*test*"))
