"""Image data sets: the drawn shapes, the readers and their cache, resizing, prompts, and damaged files."""
import codecs
import colorsys
import functools
import hashlib
import io
import os
import pickle
import random
import re
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLORS, pairs, png, tar_bytes, write_cifar100, write_webdataset
from PIL import Image

from data import files, images, shapes
from data.clip_tokenizer import clip_tokens
from models import pretrain

CLASSES, TEMPLATES = list(COLORS), ["a photo of a {c}.", "something {c}."]
TRAIN, TEST = [0, 1, 2, 0, 1, 2, 2, 1, 0], [0, 1, 2]  # the labels in write_webdataset's splits
RED, GREEN, BLUE = (png(color) for color in COLORS.values())


def check(data, labels, classes=CLASSES, templates=TEMPLATES):
    """The classes, templates, labels, and pixels are those of a folder of `write_webdataset`."""
    assert (data.classes, data.templates, data.captions) == (classes, templates, [])
    assert data.labels.tolist() == labels
    colors = torch.tensor([COLORS[classes[label].split()[-1]] for label in labels], dtype=torch.uint8)
    assert torch.equal(data.images, colors.view(-1, 3, 1, 1).expand(-1, 3, 32, 32))


def write_files(root, contents):
    """Writes file -> bytes into a folder and returns it."""
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def root(tmp_path):
    """A folder in clip-benchmark's layout, with one solid color per class."""
    return write_webdataset(tmp_path / "data")


# The drawn shapes

FEW = dict(captioned=512, train=128, test=512)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", FEW)
        patch.setattr(files, "CACHE", tmp_path_factory.mktemp("shapes"))
        return {split: images.load("shapes", split, 32) for split in FEW}


def test_the_shapes_do_not_depend_on_the_global_random_state_and_no_two_are_alike(drawn, monkeypatch):
    """Catches: Pictures are drawn from the global random state, and differ after every deleted cache."""
    monkeypatch.setattr(shapes, "COUNTS", FEW)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    for one, other in zip(drawn["train"], images.load("shapes", "train", 32)):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    pictures = torch.cat([data.images for data in drawn.values()]).flatten(1)
    assert len(pictures.unique(dim=0)) == len(pictures) == 1152


MEANS = [(181, 149, 158), (116, 103, 90), (112, 113, 106), (127, 173, 142), (73, 95, 93), (85, 84, 96),
         (167, 119, 170), (123, 86, 122)]  # of a picture of every color and form; a new VERSION changes them


def test_the_pictures_change_only_with_their_version(drawn):
    """Catches: VERSION is left as it is, and pictures of older code are read from the cache."""
    assert images.VERSION == 3
    difference = drawn["train"].images[:64:9].float().mean((2, 3)) - torch.tensor(MEANS).float()
    assert difference.abs().max() < 2  # room for other versions of Pillow and NumPy
    assert drawn["train"].captions[:3] == ["a photo of a red thing.", "a picture of a red square.",
                                           "a picture of a red thing."]
    assert len(set(drawn["train"].classes)) == 64


def test_labeled_pictures_have_another_light_than_the_captioned_ones_whose_captions_are_often_wrong(drawn):
    """Catches: Captions are perfect, those of other pictures, or all pictures alike: nothing to learn."""
    for split, light in dict(captioned=0, train=shapes.LIGHT, test=shapes.LIGHT).items():
        data = drawn[split]
        for color, degrees in shapes.HUES.items():
            chosen = [i for i, label in enumerate(data.labels) if data.classes[label].split()[0] == color]
            hue = 360 * colorsys.rgb_to_hsv(*data.images[chosen].float().mean((0, 2, 3)).tolist())[0]
            assert abs((hue - degrees - light + 180) % 360 - 180) < 10, (split, color)
    data = drawn["captioned"]
    names = [data.classes[label] for label in data.labels]
    right = sum(f" {name}" in caption for name, caption in zip(names, data.captions, strict=True))
    vague = sum(not any(f" {name}" in caption for name in data.classes) for caption in data.captions)
    assert 0.35 < right / 512 < 0.62
    assert 0.3 < vague / 512 < 0.5
    assert right + vague < 512 * 0.95


# WebDataset folders, local and on the Hub

def test_a_webdataset_folder_is_read_once_until_a_file_or_the_version_changes(root, monkeypatch):
    """Catches: Images have the labels of others, a shard is lost, or the cache serves what it should not."""
    for spelled in (str(root), str(root), f"{root}/", os.path.relpath(root)):
        check(images.load(spelled, "train", 32), TRAIN)
        check(images.load(spelled, "test", 32), TEST)
        monkeypatch.setattr(images, "pack", lambda *args: pytest.fail("read again"))
    for size, version, labels in ((16, 3, TEST), (32, 4, TEST), (32, 3, [2, 1, 0])):
        monkeypatch.setattr(images, "VERSION", version)
        if labels != TEST:  # in a file of the same length
            write_files(root, {"test/0.tar": tar_bytes(pairs(labels))[0]})
        with pytest.raises(pytest.fail.Exception, match="read again"):
            images.load(str(root), "test", size)


def test_a_damaged_cache_file_is_made_again_and_lies_in_a_private_mapping(root, cache):
    """Catches: A data set that is larger than the memory is read as a whole, or training changes its file."""
    images.load(str(root), "test", 32)
    file, = cache.rglob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(2):  # made again, and read
        data = images.load(str(root), "test", 32)
        check(data, TEST)
    assert file.stat().st_size > 100
    if (maps := Path("/proc/self/maps")).exists():  # on Linux
        (span, mode), = (line.split()[:2] for line in maps.read_text().splitlines() if file.name in line)
        low, high = (int(end, 16) for end in span.split("-"))
        assert low < data.images.data_ptr() < high and "s" not in mode


def test_the_members_of_a_tar_may_have_any_order_and_text_files_may_come_from_windows(root):
    """Catches: A .cls file is not found after its image, or a byte-order mark is in the first class name."""
    members = [(f"deep/{name}", data) for name, data in (*reversed(pairs([2, 0, 1])), ("s0.json", b"{}"))]
    write_files(root, {"test/0.tar": tar_bytes(members)[0]})
    for path in root.rglob("*.txt"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    check(images.load(str(root), "test", 32), [1, 0, 2])


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


@pytest.mark.parametrize("file, templates", [({}, ["a photo of a {c}."]), (
    {"zeroshot_classification_templates.txt": b"a {c}.\n\n the {c}. \n"}, ["a {c}.", "the {c}."])])
def test_both_splits_of_a_folder_number_their_classes_alike(tmp_path, file, templates):
    """Catches: Underscores reach the prompts, other files are taken for images, or splits differ."""
    root = write_files(tmp_path / "photos", file | {
        "train/deep_red/a.png": RED, "train/deep_red/b.PNG": RED, "train/blue/a.png": BLUE,
        "test/deep_red/a.png": RED, "test/deep_red/notes.txt": b"", "test/blue/b.png": BLUE,
        "test/blue/a.png": BLUE})
    for split, labels in dict(train=[0, 1, 1], test=[0, 0, 1]).items():
        check(images.load(str(root), split, 32), labels, ["blue", "deep red"], templates)


def test_a_missing_split_is_found_before_the_images_of_the_other_are_read(tmp_path):
    """Catches: Minutes of reading, and the mending of broken images, for a folder that cannot be used."""
    root = write_files(tmp_path / "photos", {"train/red/a.png": b"broken"})
    with pytest.raises(FileNotFoundError, match="no folder test; it needs"):
        images.load(str(root), "train", 32)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's form, whose hash the code now expects, and its pixels."""
    path, pixels = write_cifar100(tmp_path / "cifar-100-python.tar.gz")
    monkeypatch.setattr(images, "CIFAR_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, torch.from_numpy(pixels)


def test_cifar100_holds_its_images_with_their_fine_labels(archive, cache):
    """Catches: Colors or rows are mixed up, labels are the coarse ones, or 224 pixels a side are kept."""
    path, pixels = archive
    with pytest.raises(OSError, match=images.CIFAR_URL):  # where it is downloaded from
        images.load("cifar100", "test", 224)
    cache.mkdir(exist_ok=True)
    shutil.copy(path, cache)
    for source in (str(path), "cifar100"):
        for split, part, labels in (("train", slice(4), [0, 1, 1, 0]), ("test", slice(4, 6), [1, 0])):
            data = images.load(source, split, 224)
            assert torch.equal(data.images, pixels[part])
            assert (data.labels.tolist(), data.classes) == (labels, ["apple", "aquarium fish"])
    assert len(set(data.templates)) == 18
    assert all(template.count("{c}") == 1 for template in data.templates)
    assert {"a photo of a {c}.", "a bad photo of the {c}.", "a photo of the big {c}."} <= {*data.templates}


def test_cifar100_of_another_hash_is_not_unpickled(archive, cache, monkeypatch):
    """Catches: Code in a changed archive runs, since a pickle may call anything."""
    path, _ = archive
    path.write_bytes(path.read_bytes() + b"\0")
    cache.mkdir()
    copy = Path(shutil.copy(path, cache))
    for opener in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, opener, lambda *args, **options: pytest.fail("unpickled"))
    for source, file in ((str(path), path), ("cifar100", copy)):
        with pytest.raises(ValueError, match=f"{file}.*sha256"):
            images.load(source, "train", 32)


# Pixels, and threads that read them

def picture(seed, size=(20, 20)):
    """Returns a PIL image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_an_image_of_any_mode_is_resized_on_its_short_side_and_cropped_at_the_center():
    """Catches: Another aspect ratio, crop, or filter silently costs accuracy, or gray gives one channel."""
    for shape in ((40, 80), (80, 40), (35, 32), (31, 33), (1, 9)):
        image, short = picture(1, shape), min(shape)
        w, h = (32 if side == short else int(32 * side / short) for side in shape)
        left, top = int(round((w - 32) / 2.0)), int(round((h - 32) / 2.0))
        want = tensor(image.resize((w, h), Image.BICUBIC))[:, top: top + 32, left: left + 32]
        out = images.resize_crop(image, 32)
        assert out.dtype == torch.uint8 and torch.equal(out, want), shape
    for mode in ("L", "RGBA", "P", "CMYK", "1", "I;16"):
        assert images.resize_crop(Image.new(mode, (20, 10), 1), 8).shape == (3, 8, 8)


RAMP = torch.arange(0, 256, 8, dtype=torch.uint8).expand(512, 1, 32, 32)  # brighter from left to right
RAMPS = torch.cat([RAMP, RAMP.mT, RAMP], 1)  # the green channel from top to bottom


def crops(seed, pixels=RAMPS):
    return images.augment(pixels, torch.Generator().manual_seed(seed))


def test_the_generator_alone_decides_how_images_are_cropped_and_flipped():
    """Catches: Crops come from the global random state, change the aspect ratio, or have a black border."""
    out, _, again = crops(3), torch.manual_seed(9), crops(3)
    assert torch.equal(out, again) and not torch.equal(out, crops(4))
    assert out.shape == RAMPS.shape and out.dtype == torch.uint8
    assert len(out.flatten(1).unique(dim=0)) > 400
    assert (out.float().mean((0, 2, 3)) - RAMPS.float().mean((0, 2, 3))).abs().max() < 3
    across, down = out[:, 0, 16].float(), out[:, 1, :, 16].float()
    assert 0.4 < (across[:, 0] > across[:, -1]).float().mean() < 0.6  # half are flipped
    width, height = (across[:, -1] - across[:, 0]).abs() / 248, (down[:, -1] - down[:, 0]) / 248
    assert 0.68 < width.min() < 0.73 and 0.97 < width.max() <= 1  # 50 to 100% of the area
    assert (width - height).abs().max() < 0.02
    gray = torch.full_like(RAMPS, 77)
    assert torch.equal(crops(0, gray), gray)


SMALL, LARGER = [(20, 20)] * 4, [(60, 60)] * 200


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("sizes, kept", [  # a side of 64 is asked for
    (SMALL, True), ([(63, 63)] * 4, True), (LARGER, True), ([*LARGER, (64, 60)], False),
    ([(70, 70)] * 4, False), ([(24, 20)] * 4, False), ([(20, 24), *SMALL], False),
    ([*SMALL, (21, 21)], False), ([*SMALL, (64, 64), *SMALL], False)])
def test_all_but_small_squares_of_one_size_are_resized(root, monkeypatch, threads, sizes, kept):
    """Catches: The cache holds 50 times CIFAR's bytes, strips are squeezed, or threads change the order."""
    monkeypatch.setattr(images, "THREADS", threads)
    pictures, members = [picture(i, size) for i, size in enumerate(sizes)], []
    for i, image in enumerate(pictures):
        image.save(file := io.BytesIO(), "PNG")
        members += [(f"{i}.cls", str(i % 3).encode()), (f"{i}.png", file.getvalue())]
    write_files(root, {"test/0.tar": tar_bytes(members)[0]})
    data = images.load(str(root), "test", 64)
    expected = [tensor(image) if kept else images.resize_crop(image, 64) for image in pictures]
    assert torch.equal(data.images, torch.stack(expected))
    assert data.labels.tolist() == [i % 3 for i in range(len(sizes))]


def slow_pack(monkeypatch, threads, broken=(), odd=None):
    """Returns a function that packs 300 slow samples (some broken, an odd one larger), and those opened."""
    opened = []

    def open_image(i):
        opened.append(i)
        time.sleep(0.01)
        if i in broken:
            raise OSError("cannot identify image file")
        return Image.new("RGB", (80, 80) if i == odd else (60, 60), (i % 256, i // 256, 0))

    monkeypatch.setattr(images, "THREADS", threads)
    samples = [images.Sample(0, f"sample {i}", functools.partial(open_image, i)) for i in range(300)]
    return lambda: images.pack("here", "train", 64, ["a"], [], samples), opened


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("first", [0, 1, 14])
def test_the_first_unreadable_image_is_named_at_once(monkeypatch, threads, first):
    """Catches: The error comes only after all other images were read, or from the fastest thread."""
    pack, opened = slow_pack(monkeypatch, threads, broken=(first, first + 2, 38))
    with pytest.raises(ValueError, match=f"^sample {first}: not a readable image.*cannot identify"):
        pack()
    assert len(opened) < 200


@pytest.mark.parametrize("odd", [None, 0, 1])
def test_images_are_read_at_the_same_time_and_another_size_ends_the_first_reading(monkeypatch, odd):
    """Catches: Threads wait for one another, or all images are read and kept in memory once more."""
    pack, opened = slow_pack(monkeypatch, 16, odd=odd)
    start = time.perf_counter()
    assert pack().images[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]
    assert time.perf_counter() - start < 2  # one after another they take 3 s
    assert len(opened) < 400


def test_prompts_are_the_tokens_of_every_class_in_every_template_and_are_captions_by_default():
    """Catches: Prompts are found under another class, all end in padding, or captions have other images."""
    prompts = images.prompts(CLASSES, TEMPLATES)
    texts = clip_tokens([template.replace("{c}", name) for name in CLASSES for template in TEMPLATES])
    assert prompts.shape == (3, 2, 8) and not texts[:, 8:].any()
    assert torch.equal(prompts.flatten(0, 1), texts[:, :8])
    data = images.Images(None, torch.tensor([2, 0]), CLASSES, TEMPLATES, [])
    assert torch.equal(pretrain.caption_tokens(data), prompts[[2, 0]])
    texts = ["blue thing", "a much longer text about something red"]
    captions = pretrain.caption_tokens(data._replace(captions=texts))
    assert torch.equal(captions, clip_tokens(texts)[:, None, :9])


# Damaged and missing files: the error names the file to repair

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
TAR, OFFSETS = tar_bytes(pairs([0, 1, 2]))
BLANK = tar_bytes([*pairs([0]), ("s1.cls", b"1"), ("s1.bmp", bytes(4096)), *pairs([0, 1, 2])[4:]])


def tar(*members):
    return "tars/test/0.tar", tar_bytes([*pairs([0, 1, 2]), *members])[0]


CUT = r"0\.tar: .*truncated"
DAMAGED = {  # a file, its content, and words of the message
    "no tar": ("tars/test/0.tar", b"not a tar, " * 200, CUT),
    "cut before the end mark": ("tars/test/0.tar", TAR[: OFFSETS[6]], CUT),
    "cut after an image that ends in zeros": ("tars/test/0.tar", BLANK[0][: BLANK[1][4]], CUT),
    "damaged header": ("tars/test/0.tar", TAR[: OFFSETS[4]] + b"\xff" + TAR[OFFSETS[4] + 1:], CUT),
    "zeros": ("tars/test/0.tar", TAR[: OFFSETS[2]] + bytes(1024) + TAR[OFFSETS[2] + 1024:], CUT),
    "damaged image": (*tar(("x.cls", b"0"), ("x.png", RED[:60])), r"0\.tar: x\.png: not a readable image"),
    "strip": (*tar(("x.cls", b"0"), ("x.png", png("red", (1, 2000)))), r"0\.tar: x\.png: .*too elongated"),
    "PostScript": (*tar(("x.cls", b"0"), ("x.jpg", POSTSCRIPT)), r"0\.tar: x\.jpg: .*cannot identify"),
    "no label": (*tar(("x.png", RED)), r"0\.tar: x\.png"),
    "label is no number": (*tar(("x.cls", b"-1"), ("x.png", RED)), r"0\.tar: x\.cls"),
    "label out of range": (*tar(("x.cls", b"3"), ("x.png", RED)), r"0\.tar: x\.png.*3"),
    "label beyond 64 bits": (*tar(("x.cls", b"9" * 20), ("x.png", RED)), r"0\.tar: x\.png.*999"),
    "no image of a class": ("tars/test/0.tar", tar_bytes(pairs([0, 2]))[0], "tars.*no image of class green"),
    "no images": ("tars/test/nshards.txt", b"0", "tars.*test split"),
    "no number of tars": ("tars/test/nshards.txt", b"many", "test/nshards.txt"),
    "missing tar": ("tars/test/0.tar", None, "test/0.tar"),
    "garbled names": ("tars/classnames.txt", b"\xff\xfe", "classnames.txt"),
    "class that test lacks": ("folder/test/blue", None, "folder.*no image of class blue"),
    "class that train lacks": ("folder/train/blue", None, "'blue' is not a class"),
    "missing split": ("folder/test", None, "no folder test; it needs .* test/CLASS"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_or_missing_is_named_and_nothing_is_cached(tmp_path, cache, case):
    """Catches: Images are missing, since tarfile stops silently at damage, or splits have other classes."""
    file, content, words = DAMAGED[case]
    write_webdataset(tmp_path / "tars")
    write_files(tmp_path / "folder", {f"{split}/{name}/a.png": data for split in ("train", "test")
                                      for name, data in dict(red=RED, blue=BLUE).items()})
    if content is None:
        (tmp_path / file).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        images.load(str(tmp_path / Path(file).parts[0]), "test", 32)
    assert not list(cache.rglob("*test*"))


# What is read, and what is not

def test_the_cache_is_that_of_the_files_behind_links(tmp_path, capsys):
    """Catches: The old pixels are used after an image behind a link was replaced or added."""
    pixels = write_files(tmp_path / "elsewhere", {"a.png": RED})
    root = write_files(tmp_path / "set", {f"{split}/blue/a.png": BLUE for split in ("train", "test")})
    (root / "train/red").symlink_to(pixels)
    (root / "test/red").symlink_to(pixels)
    for change, labels in (({}, [0, 1]), ({"b.png": RED}, [0, 1, 1]), ({"b.png": BLUE}, [0, 1, 1])):
        write_files(pixels, change)
        data = images.load(str(root), "train", 32)
        assert data.labels.tolist() == labels and data.examples["count"] == len(labels)
    assert data.images[2, 2].min() == 255 and data.examples != images.load(str(root), "test", 16).examples


def test_hidden_entries_are_skipped_and_others_counted(tmp_path, capsys):
    """Catches: .ipynb_checkpoints becomes a class, or images of other kinds are ignored without a word."""
    gif = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 0)).save(gif, "GIF")
    root = write_files(tmp_path / "set", {f"{split}/{name}": data for split in ("train", "test") for name,
                                          data in {
        "red/a.png": RED, "red/b.gif": gif.getvalue(), "red/c.HEIC": b"", "red/more/d.png": RED,
        "red/._a.png": b"",
        ".ipynb_checkpoints/a.png": RED, "notes.txt": b""}.items()})
    data = images.load(str(root), "train", 32)
    check(data, [0, 0], ["red"], ["a photo of a {c}."])
    assert f"{root}/train: 3 files not read: " in capsys.readouterr().out


@pytest.mark.parametrize("mode, color, expected", [
    ("I;16", 65535, 255), ("I;16", 0x8000, 128), ("L", 128, 128), ("1", 1, 255), ("LA", (128, 0), 128),
    ("P", 128, 128), ("CMYK", (0, 0, 0, 127), 128), ("I", 70000, None), ("F", 0.5, None)])
def test_every_mode_of_pillow_is_read_or_refused(mode, color, expected):
    """Catches: A 16-bit gray image is all white."""
    image = Image.new(mode, (8, 8), color)
    if mode == "P":
        image = Image.new("L", (8, 8), color).convert("P")
    if expected is None:
        with pytest.raises(ValueError, match=f"mode {mode}: save it with 8 bits"):
            images.resize_crop(image, 8)
    else:
        assert images.resize_crop(image, 8).unique().tolist() == [expected]


FOLDER = {f"{split}/{name}/a.png": RED for split in ("train", "test") for name in ("a_b", "c")}
FILE = "zeroshot_classification_templates.txt"


@pytest.mark.parametrize("change, words", [
    ({FILE: b"a photo of a {}.\n"}, f"{FILE}: 'a photo of a {{}}.' has no {{c}}"), ({FILE: b""}, FILE),
    ({"train/a b/a.png": BLUE, "test/a b/a.png": BLUE}, "'a b' and 'a b' have the same prompts"),
    ({"train/C/a.png": BLUE, "test/C/a.png": BLUE}, "'C' and 'c' have the same prompts"),
    ({"classnames.txt": b"red\n\nblue\n", FILE: b"{c}"}, "classnames.txt: line 2 is blank"),
    ({"classnames.txt": b"red\x0cfish\nblue", FILE: b"{c}", "train/nshards.txt": b"1",
      "train/0.tar": tar_bytes([*pairs([0, 1]), *pairs([0])])[0]}, "0.tar: holds 2 files s0"),
    ({"classnames.txt": b"red\nblue", FILE: b"{c}", "train/nshards.txt": b"9" * 5000}, "nshards.txt")])
def test_labels_and_prompts_that_are_not_clear_are_refused(tmp_path, change, words):
    """Catches: All classes have one prompt, a blank line moves all labels, or an image of a tar is lost."""
    root = write_files(tmp_path / "set", FOLDER | change)
    with pytest.raises(ValueError, match=re.escape(words)):
        data = images.load(str(root), "train", 32)
        images.prompts(data.classes, data.templates)
    with pytest.raises(ValueError, match="'crane' and 'crane' have the same"):
        images.prompts(["crane", "heron", "crane"], ["a {c}"])


def test_links_and_hidden_folders_in_a_tar_are_told_of_or_skipped(tmp_path, capsys):
    root = write_webdataset(tmp_path / "set")
    with tarfile.open(root / "test/0.tar", "a") as tar:
        for name, data in {".ipynb_checkpoints/s0.cls": b"0", ".ipynb_checkpoints/s0.png": RED}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("s9.png")
        link.type, link.linkname = tarfile.LNKTYPE, "s0.png"
        tar.addfile(link)
    check(images.load(str(root), "test", 32), TEST)
    assert f"{root}/test: 1 files not read: links 1" in capsys.readouterr().out
