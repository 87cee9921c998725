"""Image data sets as tensors: images, labels, class names, prompt templates, and captions.

A reader returns (classes, templates, samples). `load` turns the samples into tensors once and keeps them in a
cache file.
"""
import contextlib
import functools
import hashlib
import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import files, hub, schema
from data.clip_tokenizer import clip_tokens

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
VERSION = 3  # of the tensors in cache files: change it with them, so that older files are not used
THREADS = os.cpu_count()
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of Pillow, with 8 bits at most


class Sample(NamedTuple):
    """An image that was not read yet."""

    label: int
    name: Any  # in messages
    open: Callable  # returns a PIL image
    path: Path | None = None  # of the file that holds it, if that may change


class Images(NamedTuple):
    """A split of a data set."""

    images: torch.Tensor  # uint8 [N, 3, S, S]
    labels: torch.Tensor  # int64 [N]
    classes: list  # L names
    templates: list  # "a photo of a {c}.", ...
    captions: list  # N texts for pretraining, or empty: the class name in any template is then a caption
    examples: dict | None = None  # count (N) and sha256 of the images, labels, and captions


def prompts(classes, templates):
    """Returns the token ids [L, P, T] of L class names in each of P templates.

    Raises ValueError if two classes have the same prompts, so that no model could tell them apart.
    """
    tokens = trim(clip_tokens([t.replace("{c}", c) for c in classes for t in templates]))  # [L * P, T]
    tokens, first = tokens.unflatten(0, (len(classes), -1)), {}
    for i, ids in enumerate(tokens.tolist()):
        if (j := first.setdefault(str(ids), i)) < i:
            raise ValueError(f"classes {classes[j]!r} and {classes[i]!r} have the same prompts: rename one")
    return tokens


def trim(tokens):
    """Returns token ids [N, T] without the padding that follows the longest text's end token."""
    return tokens[:, : int(tokens.argmax(-1).max()) + 1]


def augment(images, generator):
    """Returns random crops of uint8 images [B, 3, S, S], resized back; half of them are flipped.

    A crop has 50 to 100% of the image's area.
    """
    u = torch.rand(len(images), 4, generator=generator)
    u = (u.pin_memory() if images.is_cuda else u).to(images.device, non_blocking=True)
    scale = (0.5 + 0.5 * u[:, 0]).sqrt()
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = torch.where(u[:, 3] < 0.5, -scale, scale)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = (1 - scale)[:, None] * (2 * u[:, 1:3] - 1)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    crops = F.grid_sample(images.float(), grid, align_corners=False, padding_mode="border")
    return crops.round().to(torch.uint8)


def load(source, split, size):
    """Returns a split of a data set as Images of size x size pixels, from the cache if it was read before.

    If all images are squares of one smaller size, they are not resized. The models do that on the device.

    source: shapes, cifar100 (or a path to cifar-100-python.tar.gz), caltech101, flowers, resisc45, cars,
    aircraft, country211, a Hub id or a folder with the layout of `webdataset`, or a folder with
    train/CLASS/*.jpg and test/CLASS/*.jpg. Raises ValueError or OSError that names the file.
    """
    key, found = source, None
    if Path(source).is_dir():  # the key is all that is read, and when it changed: a cache is of these files
        source = str(Path(source).resolve())
        found = reader(source)(split)
        key = found[:2], [(x.label, str(x.name), *stamp(x.path)) for x in found[2]]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    cache = files.CACHE / "images" / f"{Path(source).name}-{split}-{size}-{digest}-v{VERSION}.pt"
    with contextlib.suppress(OSError, ValueError):  # a damaged file is rebuilt
        return cached(cache)
    with files.lock_cache("images.lock"):  # one process reads the images, and the others take its cache file
        with contextlib.suppress(OSError, ValueError):
            return cached(cache)
        data = pack(source, split, size, *(found or reader(source)(split)))
        try:
            files.save(cache, data._asdict())
        except OSError as error:
            print(f"the images are not kept for the next run: {error}")
    return data


def stamp(path):
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def cached(path):
    """Returns the Images in a cache file. Raises ValueError or FileNotFoundError if it has none."""
    content = files.read(path)
    schema.check(content, path, "cache")
    images, labels, n = content["images"], content["labels"], content["examples"]["count"]
    valid = images.dtype == torch.uint8 and images.shape == (n, 3, *images.shape[2:])
    valid = valid and labels.dtype == torch.int64 and labels.shape == (n,)
    if not valid or not set(labels.unique().tolist()) <= {*range(len(content["classes"]))}:
        raise ValueError(f"{path}: not images and labels")
    return Images(**content)


def reader(source):
    """Returns the function that reads a split of a data set, as `load` names them."""
    root = Path(source)
    if source == "cifar100" or root.name == "cifar-100-python.tar.gz":
        return functools.partial(cifar100, None if source == "cifar100" else root)
    if source == "shapes":
        from data.shapes import shapes
        return shapes
    from data import image_files
    return image_files.reader(source)


def pack(source, split, size, classes, templates, samples, texts=(), keep_small=True):
    """Returns a reader's samples as Images. Raises ValueError that names the sample or class.

    keep_small: whether to keep images at their own size if all are s x s pixels for an s below `size`.
    """
    if not len(samples) or not classes:
        raise ValueError(f"{source}: its {split} split holds no images")
    if invalid := [x for x in samples if not 0 <= x.label < len(classes)]:
        raise ValueError(f"{invalid[0].name}: label {invalid[0].label}, but there are {len(classes)} classes")
    labels = torch.tensor([x.label for x in samples])
    if empty := [c for c, n in zip(classes, labels.bincount(minlength=len(classes))) if not n]:
        raise ValueError(f"{source}: its {split} split has no image of class {', '.join(empty[:5])}")
    read = functools.partial(read_image, size=size, keep_small=keep_small)
    images = torch.empty(len(samples), *read(samples[0]).shape, dtype=torch.uint8)
    with ThreadPoolExecutor(THREADS) as pool:  # Pillow releases the GIL while it decodes and resizes
        run = pool.map if images[0].numel() > 10_000 else map  # threads only slow tiny images down
        for i, x in enumerate(tqdm(run(read, samples), f"{source} {split}", len(samples), disable=None)):
            if x.shape != images.shape[1:]:
                break
            images[i] = x
        else:
            digest = hashlib.sha256(repr((labels.tolist(), list(texts))).encode())
            digest.update(images.numpy())
            examples = dict(count=len(labels), sha256=digest.hexdigest())
            return Images(images, labels, list(classes), list(templates), list(texts), examples)
    # The images have several sizes: all of them are resized.
    return pack(source, split, size, classes, templates, samples, texts, keep_small=False)


def read_image(sample, size, keep_small):
    """Returns a sample's image as uint8 [3, S, S]; S is `size`, or less as in `pack`."""
    # Pillow raises errors of many classes.
    with files.explain(f"{sample.name}: not a readable image", Exception):
        image = sample.open()
        w, h = image.size
        return resize_crop(image, w if keep_small and w == h < size else size)


def resize_crop(image, size):
    """Returns a PIL image as uint8 [3, size, size]: bicubic resize of the short side and center crop."""
    if image.mode == "I;16" and image.format != "TIFF":  # 16-bit gray, which Pillow would clip to white
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    if image.mode not in MODES:
        raise ValueError(f"its pixels have mode {image.mode}: save it with 8 bits per channel")
    w, h = image.size
    if w * h > 2**26:
        raise ValueError(f"{w} x {h} pixels: too large")
    image = image.convert("RGB")
    w, h = max(size, size * w // h), max(size, size * h // w)
    if max(w, h) > 1024 * size:  # a strip that would need a lot of memory once it is resized
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels: too elongated")
    image = image.resize((w, h), Image.BICUBIC)
    left, top = round((w - size) / 2), round((h - size) / 2)
    pixels = np.array(image.crop((left, top, left + size, top + size)))  # [S, S, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # here, in the threads of `pack`


def cifar100(path, split):
    """Reads CIFAR-100's python archive. It holds pickles, so its sha256 is checked before it is opened."""
    path = path or hub.download(CIFAR_URL, files.CACHE / "cifar-100-python.tar.gz")
    data = files.read_bytes(path)
    if (digest := hashlib.sha256(data).hexdigest()) != CIFAR_SHA256:
        raise ValueError(f"{path}: sha256 {digest}, but CIFAR-100's is {CIFAR_SHA256}; download it again")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # one pass: seeking back in gzip reads it again
        parts = {Path(member.name).name: pickle.load(tar.extractfile(member), encoding="bytes")
                 for member in tar if Path(member.name).name in (split, "meta")}
    table = parts[split]
    pixels = table[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [N, 32, 32, 3]
    samples = [Sample(label, f"{path}: {split} {i}", functools.partial(Image.fromarray, pixels[i]))
               for i, label in enumerate(table[b"fine_labels"])]
    kinds = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    templates = [f"a {kind}photo of {a} {{c}}." for a in ("a", "the") for kind in kinds]
    templates += [f"a photo of {a} {size} {{c}}." for a in ("a", "the") for size in ("small", "big")]
    return [n.decode().replace("_", " ") for n in parts["meta"][b"fine_label_names"]], templates, samples
