"""Image data sets: the drawn shapes, the readers and their cache, resizing, prompts, and damaged files."""
import codecs
import colorsys
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
from conftest import COLORS, REFUSED, pairs, png, tar_bytes, write_cifar100, write_webdataset
from PIL import Image

from data import files, images
from models.tokenizer import clip_tokens

CLASSES = list(COLORS)
TEMPLATES = ["a photo of a {c}.", "something {c}."]
TRAIN, TEST = [0, 1, 2, 0, 1, 2, 2, 1, 0], [0, 1, 2]  # the labels in write_webdataset's splits
RED, GREEN, BLUE = (png(color) for color in COLORS.values())


def solid(label):
    return torch.tensor(COLORS[CLASSES[label]], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)


def check(data, labels):
    """The classes, templates, labels, and pixels are those of a folder of `write_webdataset`."""
    assert data.classes == CLASSES
    assert data.templates == TEMPLATES
    assert data.captions == []
    assert data.labels.tolist() == labels
    assert data.images.dtype == torch.uint8
    assert all(torch.equal(image, solid(label)) for image, label in zip(data.images, labels, strict=True))


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


def test_the_shapes_have_at_least_40_different_classes(drawn):
    classes = drawn["train"].classes
    assert len(classes) >= 40
    assert len(set(classes)) == len(classes)


def test_the_shapes_do_not_depend_on_the_global_random_state(drawn, monkeypatch):
    """Catches: Pictures are drawn from the global random state, and differ after every deleted cache."""
    monkeypatch.setattr(images, "COUNTS", FEW)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    first, again = drawn["train"], images.load("shapes", "train", 32)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert first.captions == again.captions


def test_no_two_pictures_are_alike(drawn):
    pictures = drawn["train"].images
    assert len(pictures.flatten(1).unique(dim=0)) == len(pictures)


def test_the_test_split_has_other_pictures_than_the_train_split(drawn):
    assert not torch.equal(drawn["train"].images, drawn["test"].images[:128])


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


@pytest.mark.parametrize("split, light", [("captioned", 0), ("train", images.LIGHT), ("test", images.LIGHT)])
def test_colored_light_shifts_every_hue_of_the_labeled_pictures(drawn, split, light):
    """Catches: Captioned and labeled pictures look alike, so that a reward has nothing to learn."""
    data = drawn[split]
    for color, degrees in images.HUES.items():
        chosen = [i for i, label in enumerate(data.labels) if data.classes[label].split()[0] == color]
        mean = data.images[chosen].float().mean((0, 2, 3)).tolist()
        hue = 360 * colorsys.rgb_to_hsv(*mean)[0]
        assert abs((hue - degrees - light + 180) % 360 - 180) < 10, color


def test_the_captions_are_often_vague_or_wrong(drawn):
    """Catches: Captions are perfect and leave nothing to teach to a base, or belong to other pictures."""
    data = drawn["captioned"]
    right = vague = 0
    for label, caption in zip(data.labels, data.captions, strict=True):
        color, form = data.classes[label].split()
        right += f" {color} {form}" in caption
        vague += not any(f" {name}" in caption for name in data.classes)
    assert 0.35 < right / 512 < 0.62
    assert 0.3 < vague / 512 < 0.5
    assert right + vague < 512 * 0.95


# WebDataset folders, local and on the Hub

@pytest.mark.parametrize("split, labels", [("train", TRAIN), ("test", TEST)])
def test_a_webdataset_folder_holds_its_images_with_their_labels(root, split, labels):
    """Catches: Images have the labels of others, or a shard is lost."""
    check(images.load(str(root), split, 32), labels)


def test_every_split_is_read_only_once(root, monkeypatch):
    """Catches: The cache is not used, or serves one split for the other."""
    for split in ("train", "test"):
        images.load(str(root), split, 32)
    use_the_cache_only(monkeypatch)
    check(images.load(str(root), "train", 32), TRAIN)
    check(images.load(str(root), "test", 32), TEST)


def test_the_cache_does_not_serve_another_size(root, monkeypatch):
    images.load(str(root), "test", 32)
    use_the_cache_only(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="read again"):
        images.load(str(root), "test", 16)


def test_a_folder_whose_files_changed_is_read_again(root):
    """Catches: The cache is not renewed when another file of the same length replaces one."""
    images.load(str(root), "test", 32)
    (root / "test" / "0.tar").write_bytes(tar_bytes(pairs([2, 1, 0]))[0])
    check(images.load(str(root), "test", 32), [2, 1, 0])


@pytest.mark.parametrize("spell", [lambda path: f"{path}/", os.path.relpath], ids=["slash", "relative"])
def test_the_cache_serves_every_spelling_of_a_folder(root, monkeypatch, spell):
    images.load(str(root), "test", 32)
    use_the_cache_only(monkeypatch)
    check(images.load(spell(root), "test", 32), TEST)


def test_the_members_of_a_tar_may_have_any_order(root):
    """Catches: A .cls file is not found after its image or in a folder, or a .json is read as an image."""
    members = [*reversed(pairs([2, 0, 1])), ("s0.json", b"{}")]
    (root / "test" / "0.tar").write_bytes(tar_bytes([(f"deep/{name}", data) for name, data in members])[0])
    check(images.load(str(root), "test", 32), [1, 0, 2])


def test_text_files_may_come_from_windows(root):
    """Catches: A byte-order mark becomes a part of the first class name, and so of its prompts."""
    for path in root.rglob("*.txt"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    check(images.load(str(root), "test", 32), TEST)


@pytest.fixture(params=["org/name", "caltech101"])
def hub(request, root, serve, monkeypatch):
    """A server of one data set, and the name that --data gives it."""
    repo = dict(caltech101="clip-benchmark/wds_vtab-caltech101").get(request.param, request.param)
    server = serve()
    server.files = {f"/datasets/{repo}/resolve/main/{file.relative_to(root)}": file.read_bytes()
                    for file in root.rglob("*") if file.is_file()}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server, request.param


def test_every_file_of_a_data_set_on_the_hub_is_downloaded_once(hub):
    """Catches: The address is wrong, or a file is downloaded again for each split."""
    server, source = hub
    check(images.load(source, "train", 32), TRAIN)
    check(images.load(source, "test", 32), TEST)
    assert sorted(path for path, _ in server.seen) == sorted(server.files)


def test_a_data_set_of_the_hub_needs_no_network_the_second_time(hub, monkeypatch):
    _, source = hub
    images.load(source, "test", 32)
    use_the_cache_only(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    check(images.load(source, "test", 32), TEST)


def test_without_a_network_the_error_says_what_to_download_and_where_to_put_it(monkeypatch, cache):
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    with pytest.raises(OSError) as caught:
        images.load("flowers", "test", 32)
    name = "datasets/clip-benchmark/wds_vtab-flowers"
    assert f"{REFUSED}/{name}/resolve/main/classnames.txt" in str(caught.value)
    assert str(cache / "hub" / name / "classnames.txt") in str(caught.value)


# Folders of images

def write_folder(root, **splits):
    """Writes root/SPLIT/CLASS/FILE from split -> class -> file -> bytes."""
    for split, classes in splits.items():
        for name, contents in classes.items():
            (root / split / name).mkdir(parents=True)
            for file, data in contents.items():
                (root / split / name / file).write_bytes(data)
    return root


@pytest.fixture
def photos(tmp_path):
    """A folder train/CLASS/*, test/CLASS/* with two classes."""
    return write_folder(
        tmp_path / "photos", train=dict(deep_red={"a.png": RED, "b.PNG": RED}, blue={"a.png": BLUE}),
        test=dict(deep_red={"a.png": RED, "notes.txt": b""}, blue={"b.png": BLUE, "a.png": BLUE}))


@pytest.mark.parametrize("split, labels", [("train", [0, 1, 1]), ("test", [0, 0, 1])])
def test_both_splits_of_a_folder_number_their_classes_alike(photos, split, labels):
    """Catches: Underscores reach the prompts, other files are taken for images, or splits differ."""
    data = images.load(str(photos), split, 32)
    assert data.classes == ["blue", "deep red"]
    assert data.labels.tolist() == labels
    assert all(torch.equal(image, solid([2, 0][label])) for image, label in zip(data.images, labels))


def test_a_folder_without_templates_gets_the_photo_template(photos):
    assert images.load(str(photos), "train", 32).templates == ["a photo of a {c}."]


def test_a_folder_may_have_templates(photos):
    (photos / "zeroshot_classification_templates.txt").write_text("a {c}.\n\n the {c}. \n")
    assert images.load(str(photos), "train", 32).templates == ["a {c}.", "the {c}."]


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
    """Catches: The archive's planar layout mixes up colors or rows, or labels are the coarse ones."""
    path, pixels = archive
    data = images.load(str(path), split, 32)
    assert torch.equal(data.images, pixels[part])
    assert data.labels.tolist() == labels
    assert data.classes == ["apple", "aquarium fish"]


def test_cifar100_has_18_templates(archive):
    path, _ = archive
    templates = images.load(str(path), "train", 32).templates
    assert len(set(templates)) == 18
    assert all(template.count("{c}") == 1 for template in templates)
    assert {"a photo of a {c}.", "a bad photo of the {c}.", "a photo of the big {c}."} <= set(templates)


def test_cifar100_is_read_from_an_archive_in_the_cache(archive, cache):
    path, pixels = archive
    cache.mkdir()
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


def test_cifar100_without_a_network_names_the_url_and_the_file(cache):
    with pytest.raises(OSError) as caught:
        images.load("cifar100", "train", 32)
    for word in (images.CIFAR_URL, str(cache / "cifar-100-python.tar.gz")):
        assert word in str(caught.value)


# Pixels

@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (33, 32), (35, 32), (31, 33), (7, 5), (1, 9),
                                   (300, 3)])
def test_an_image_is_resized_on_its_short_side_and_cropped_at_the_center(shape):
    """Catches: Another aspect ratio, crop, or filter silently costs accuracy."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    out = images.resize_crop(image, 32)
    short = min(shape)
    w, h = (32 if side == short else int(32 * side / short) for side in shape)
    resized = image.resize((w, h), Image.BICUBIC)
    left, top = int(round((w - 32) / 2.0)), int(round((h - 32) / 2.0))
    want = torch.from_numpy(np.array(resized)[top: top + 32, left: left + 32]).permute(2, 0, 1)
    assert out.shape == (3, 32, 32)
    assert out.dtype == torch.uint8
    assert torch.equal(out, want)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_an_image_of_any_mode_becomes_rgb(mode):
    """Catches: Gray and palette files give one channel, or fail."""
    image = Image.new(mode, (20, 10), 1)
    assert images.resize_crop(image, 8).shape == (3, 8, 8)


RAMP = torch.arange(0, 256, 8, dtype=torch.uint8).expand(512, 3, 32, 32)  # brighter from left to right


@pytest.fixture(scope="module")
def crops():
    return images.augment(RAMP, torch.Generator().manual_seed(3))


def test_augmented_images_have_the_shape_and_dtype_of_the_images(crops):
    assert crops.shape == RAMP.shape
    assert crops.dtype == torch.uint8


def test_the_generator_alone_decides_how_images_are_augmented(crops):
    """Catches: Crops come from the global random state, which a resumed run does not repeat."""
    torch.manual_seed(9)
    assert torch.equal(crops, images.augment(RAMP, torch.Generator().manual_seed(3)))
    assert not torch.equal(crops, images.augment(RAMP, torch.Generator().manual_seed(4)))


def test_every_image_of_a_batch_gets_another_crop(crops):
    assert len(crops.flatten(1).unique(dim=0)) > 400


def test_crops_are_as_bright_as_the_images(crops):
    assert (crops.float().mean() - RAMP.float().mean()).abs() < 3


def test_half_of_the_crops_are_flipped(crops):
    row = crops[:, 0, 16].float()
    assert 0.4 < (row[:, 0] > row[:, -1]).float().mean() < 0.6


def test_a_crop_has_50_to_100_percent_of_the_area(crops):
    row = crops[:, 0, 16].float()
    side = (row[:, 0] - row[:, -1]).abs() / 248
    assert 0.68 < side.min() < 0.73
    assert 0.97 < side.max() <= 1


def test_a_crop_of_one_color_keeps_the_color():
    """Catches: The border of a crop is filled with black."""
    gray = torch.full((4, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(images.augment(gray, torch.Generator().manual_seed(0)), gray)


# Images at their own size, read by threads

def picture(seed, size=(20, 20)):
    """Returns a PIL image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def write_pictures(root, sizes):
    """Writes pictures of these sizes, in turn of the classes a and b; returns them and their labels in order.

    The same pictures are under tars/ in clip-benchmark's layout, in two shards.
    """
    n = len(sizes)
    pictures = [picture(i, size) for i, size in enumerate(sizes)]
    order = sorted(range(n), key=lambda i: i % 2)
    contents = {name: {f"{i:04}.png": encoded(pictures[i]) for i in range(k, n, 2)}
                for k, name in enumerate("ab")}
    write_folder(root, train=contents)
    members = [member for i in order for member in (
        (f"{i:04}.cls", str(i % 2).encode()), (f"{i:04}.png", encoded(pictures[i])))]
    (root / "tars/train").mkdir(parents=True)
    for i, part in enumerate((members[:6], members[6:])):
        (root / f"tars/train/{i}.tar").write_bytes(tar_bytes(part)[0])
    for file, content in {"classnames.txt": "a\nb\n", "train/nshards.txt": "2",
                          "zeroshot_classification_templates.txt": "a photo of a {c}."}.items():
        (root / "tars" / file).write_text(content)
    return [pictures[i] for i in order], [i % 2 for i in order]


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [1, 20, 31])
def test_small_squares_stay_at_their_own_size(tmp_path, size):
    """Catches: The cache holds 50 times the bytes of CIFAR's images, which the models resize anyway."""
    pictures, labels = write_pictures(tmp_path / "data", [(size, size)] * 8)
    data = images.load(str(tmp_path / "data"), "train", 32)
    assert data.images.shape == (8, 3, size, size)
    assert torch.equal(data.images, torch.stack([pixels_of(image) for image in pictures]))
    assert data.labels.tolist() == labels


@pytest.mark.parametrize("at", [0, 4, 7], ids=["first", "middle", "last"])
@pytest.mark.parametrize("odd", [(24, 20), (20, 24), (40, 40), (32, 32), (21, 21), (19, 19), (300, 200)])
def test_if_one_image_has_another_size_all_are_resized(tmp_path, odd, at):
    """Catches: Images of one data set differ in size, or some are resized twice."""
    sizes = [(20, 20)] * 8
    order = sorted(range(8), key=lambda i: i % 2)
    sizes[order[at]] = odd
    pictures, labels = write_pictures(tmp_path / "data", sizes)
    assert pictures[at].size == odd
    data = images.load(str(tmp_path / "data"), "train", 32)
    assert data.images.shape == (8, 3, 32, 32)
    assert torch.equal(data.images, torch.stack([images.resize_crop(image, 32) for image in pictures]))
    assert data.labels.tolist() == labels


@pytest.mark.parametrize("size", [(32, 32), (40, 40), (24, 20), (20, 24)], ids=str)
def test_images_that_are_larger_or_not_square_are_resized(tmp_path, size):
    """Catches: Strips smaller than the model's input stay as they are and are squeezed to a square."""
    pictures, _ = write_pictures(tmp_path / "data", [size] * 4)
    data = images.load(str(tmp_path / "data"), "train", 32)
    assert torch.equal(data.images, torch.stack([images.resize_crop(image, 32) for image in pictures]))


@pytest.mark.parametrize("sizes", [[(60, 60)] * 41, [(80, 70)] * 41, [(60, 60)] * 40 + [(64, 60)]],
                         ids=["small", "large", "mixed"])
def test_tars_and_folders_give_the_same_images_with_any_number_of_threads(tmp_path, monkeypatch, sizes):
    """Catches: Images are in the order in which threads finish, or threads share a position in a tar."""
    pictures, labels = write_pictures(tmp_path / "data", sizes)
    want = torch.stack([pixels_of(x) if len(set(sizes)) == 1 and x.size == (60, 60)
                        else images.resize_crop(x, 64) for x in pictures])
    for threads in (1, 4, 16):
        monkeypatch.setattr(images, "THREADS", threads)
        tars = images.webdataset(lambda name: tmp_path / "data/tars" / name, "train")
        for reader in (tars, images.folder(tmp_path / "data", "train")):
            data = images.pack("here", "train", 64, *reader)
            assert torch.equal(data.images, want)
            assert data.labels.tolist() == labels
            assert data.classes == ["a", "b"]


def test_a_tar_with_many_members_is_read_by_several_threads(tmp_path, monkeypatch):
    """Catches: A thread reads where another one has moved the position in the same open file."""
    root = write_webdataset(tmp_path / "data")
    colors = [(i % 256, i // 256, 77) for i in range(600)]
    members = [member for i, color in enumerate(colors) for member in (
        (f"{i}.png", png(color, (60, 60))), (f"{i}.cls", str(i % 3).encode()))]
    (root / "test/0.tar").write_bytes(tar_bytes(members)[0])
    monkeypatch.setattr(images, "THREADS", 8)
    data = images.load(str(root), "test", 64)
    assert data.images.shape == (600, 3, 60, 60)
    assert data.images[:, :, 3, 5].tolist() == [list(color) for color in colors]
    assert data.labels.tolist() == [i % 3 for i in range(600)]


def slow_samples(n, broken=None, odd=None, seconds=0.01):
    """Returns n samples whose opening takes time, and the list of those that were opened.

    broken: one that cannot be read. odd: one of another size.
    """
    opened = []

    def opener(i):
        def open_image():
            opened.append(i)
            time.sleep(seconds)
            if i == broken:
                raise OSError("cannot identify image file")
            return Image.new("RGB", (80, 80) if i == odd else (60, 60), (i % 256, i // 256, 0))
        return open_image

    return [(0, f"sample {i}", opener(i)) for i in range(n)], opened


@pytest.mark.parametrize("broken", [0, 1, 9])
def test_an_unreadable_image_is_named_at_once(monkeypatch, broken):
    """Catches: The error comes only after all other images were read, hours later."""
    monkeypatch.setattr(images, "THREADS", 2)
    samples, opened = slow_samples(2_000, broken)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"^sample {broken}: not a readable image.*cannot identify"):
        images.pack("here", "train", 64, ["a"], [], samples)
    assert time.perf_counter() - start < 3  # reading all of them takes 10 s
    assert len(opened) < 200


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_the_first_of_several_unreadable_images_is_named(tmp_path, monkeypatch, threads):
    """Catches: The message depends on which thread is faster."""
    write_pictures(tmp_path / "data", [(60, 60)] * 40)
    for i in (14, 16, 38, 39):
        (tmp_path / "data/train" / "ab"[i % 2] / f"{i:04}.png").write_bytes(b"<html>")
    monkeypatch.setattr(images, "THREADS", threads)
    with pytest.raises(ValueError, match=r"train/a/0014\.png: not a readable image"):
        images.load(str(tmp_path / "data"), "train", 64)


def test_images_are_read_at_the_same_time(monkeypatch):
    """Catches: Threads wait for one another, so that a large data set takes hours."""
    monkeypatch.setattr(images, "THREADS", 8)
    samples, _ = slow_samples(80, seconds=0.02)
    start = time.perf_counter()
    data = images.pack("here", "train", 64, ["a"], [], samples)
    assert time.perf_counter() - start < 1  # one after another they take 1.6 s
    assert data.images[:, 0, 0, 0].tolist() == list(range(80))


@pytest.mark.parametrize("odd", [0, 1])
def test_another_size_ends_the_first_reading_at_once(monkeypatch, odd):
    """Catches: All images are read and kept in memory once more, beside the second reading."""
    monkeypatch.setattr(images, "THREADS", 2)
    samples, opened = slow_samples(300, odd=odd, seconds=0.001)
    data = images.pack("here", "train", 64, ["a"], [], samples)
    assert data.images.shape == (300, 3, 64, 64)
    assert len(opened) < 400


def test_cached_images_are_equal_and_of_another_version_another_file(tmp_path, cache, monkeypatch):
    """Catches: After a change of the tensors, those of an old cache file are used."""
    write_pictures(tmp_path / "data", [(20, 20)] * 8)
    source = str(tmp_path / "data")
    first, again = images.load(source, "train", 32), images.load(source, "train", 32)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert first[2:] == again[2:]
    file, = cache.rglob("*.pt")
    assert f"-v{images.VERSION}." in file.name
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    images.load(source, "train", 32)
    assert len(list(cache.rglob("*.pt"))) == 2
    use_the_cache_only(monkeypatch)
    images.load(source, "train", 32)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_cached_images_lie_in_a_private_mapping_of_their_file(tmp_path, cache):
    """Catches: A data set that is larger than the memory is read as a whole, or training changes its file."""
    write_pictures(tmp_path / "data", [(20, 20)] * 400)
    images.load(str(tmp_path / "data"), "train", 32)
    data = images.load(str(tmp_path / "data"), "train", 32)
    file, = cache.rglob("*.pt")
    (span, mode), = (line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()
                     if file.name in line)
    low, high = (int(end, 16) for end in span.split("-"))
    assert low < data.images.data_ptr() < high
    assert "s" not in mode


def test_small_images_of_cifar100_stay_at_their_own_size_for_a_large_model(archive):
    """Catches: 60,000 images are kept at 224 x 224 pixels: 9 GB instead of 184 MB."""
    path, pixels = archive
    assert torch.equal(images.load(str(path), "train", 224).images, pixels[:4])
    assert images.load(str(path), "train", 28).images.shape == (4, 3, 28, 28)


# Prompts and captions

def test_prompts_are_the_tokens_of_every_class_in_every_template():
    """Catches: Prompts of one class are found under another, or all prompts end in padding."""
    prompts = images.prompts(CLASSES, TEMPLATES)
    assert prompts.shape[:2] == (3, 2)
    assert prompts.shape[2] < 12
    for tokens, name in zip(prompts, CLASSES):
        texts = clip_tokens([f"a photo of a {name}.", f"something {name}."])
        assert torch.equal(tokens, texts[:, : tokens.shape[1]])
        assert not texts[:, tokens.shape[1]:].any()


def test_without_captions_the_prompts_of_its_class_are_an_images_captions():
    data = images.Images(None, torch.tensor([2, 0]), CLASSES, TEMPLATES, [])
    assert torch.equal(images.captions(data), images.prompts(CLASSES, TEMPLATES)[[2, 0]])


def test_a_caption_belongs_to_its_image():
    texts = ["blue thing", "a much longer text about something red"]
    captions = images.captions(images.Images(None, torch.tensor([2, 0]), CLASSES, TEMPLATES, texts))
    assert captions.shape == (2, 1, 9)
    assert captions[0, 0, :4].tolist() == clip_tokens(["blue thing"])[0, :4].tolist()
    assert (captions.argmax(-1).flatten() == torch.tensor([3, 8])).all()


# Damaged and missing files: the error names the file to repair

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
def test_a_truncated_or_damaged_tar_is_named(root, cut):
    """Catches: Images are silently missing, since tarfile stops without an error at a damaged header."""
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
def test_a_damaged_member_of_a_tar_is_named_and_nothing_is_cached(root, cache, case):
    members, words = MEMBERS[case]
    good = [(f"good{name}", data) for name, data in pairs([0, 1, 2])]
    (root / "test" / "0.tar").write_bytes(tar_bytes(good + members)[0])
    with pytest.raises(ValueError, match=words):
        images.load(str(root), "test", 32)
    assert not list(cache.rglob("*test*"))


@pytest.mark.parametrize("file, content", [
    ("test/nshards.txt", b""), ("test/nshards.txt", b"many"), ("test/nshards.txt", None),
    ("test/0.tar", None), ("classnames.txt", b"\xff\xfe"), ("zeroshot_classification_templates.txt", None)])
def test_a_list_that_is_empty_garbled_or_missing_is_named(root, file, content):
    path = root / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=file):
        images.load(str(root), "test", 32)


def test_a_class_without_images_is_named(root):
    """Catches: Files are missing, and the accuracy is that of the other classes."""
    (root / "test" / "0.tar").write_bytes(tar_bytes(pairs([0, 2]))[0])
    with pytest.raises(ValueError, match="data.*green"):
        images.load(str(root), "test", 32)


def test_a_split_without_images_is_named(root):
    for file in (root / "test").glob("*"):
        file.write_text("0" if file.suffix == ".txt" else "")
    with pytest.raises(ValueError, match="data.*test split"):
        images.load(str(root), "test", 32)


BOTH = dict(red={"a.png": RED}, blue={"a.png": BLUE})
FOLDERS = {
    "empty class": (BOTH | dict(blue={}), BOTH, "train", "blue"),
    "class that test lacks": (BOTH, dict(red={"a.png": RED}), "test", "blue"),
    "class that train lacks": (dict(red={"a.png": RED}), BOTH, "test", "blue"),
    "no test split": (BOTH, {}, "test", "no folder test; it needs .* test/CLASS"),
    "damaged image": (dict(red={"a.png": RED[:60]}), {}, "train", "red/a.png"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_wrong_in_a_folder_of_images_is_named(tmp_path, case):
    """Catches: A split lacks a class, so that its numbers mean other classes than in the other split."""
    train, test, split, words = FOLDERS[case]
    root = write_folder(tmp_path / "data", train=train, test=test)
    with pytest.raises((ValueError, OSError), match=words):
        images.load(str(root), split, 32)


@pytest.mark.parametrize("source", ["shapez", "no/such/dir", "/nothing", "nothing/", "./nothing", "../no"])
def test_a_mistyped_source_is_not_looked_up_on_the_hub(source, serve, monkeypatch):
    """Catches: A mistyped path gives an error about the network."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(ValueError, match="caltech101") as caught:
        images.load(source, "test", 32)
    assert source in str(caught.value)
    assert not server.seen


def test_a_damaged_cache_file_is_made_again(root, cache):
    whole = images.load(str(root), "test", 32)
    file, = cache.rglob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(2):  # made again, and read
        data = images.load(str(root), "test", 32)
        assert data.images.equal(whole.images) and data.classes == whole.classes
    assert file.stat().st_size > 100
