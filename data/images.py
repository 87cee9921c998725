"""Image data sets as tensors: images, labels, class names, prompt templates, and captions.

A reader returns (classes, templates, samples). A sample is (label, name for errors, function that returns a
PIL image). `load` turns the samples into tensors once and keeps them in a cache file.
"""
import colorsys
import contextlib
import functools
import hashlib
import io
import math
import os
import pickle
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import files
from models.tokenizer import clip_tokens

HUB = dict(caltech101="wds_vtab-caltech101", flowers="wds_vtab-flowers", resisc45="wds_vtab-resisc45",
           cars="wds_cars", aircraft="wds_fgvc_aircraft", country211="wds_country211")  # of clip-benchmark
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VERSION = 2  # of the tensors in cache files: change it with them, so that older files are not used
THREADS = os.cpu_count()
OPEN = functools.partial(Image.open, formats=("JPEG", "PNG", "WEBP", "BMP"))  # PostScript would run code


class Images(NamedTuple):
    """A split of a data set."""

    images: torch.Tensor  # uint8 [N, 3, S, S]
    labels: torch.Tensor  # int64 [N]
    classes: list  # L names
    templates: list  # "a photo of a {c}.", ...
    captions: list  # N texts for pretraining, or empty: the class name in any template is then a caption


def prompts(classes, templates):
    """Returns the token ids [L, P, T] of L class names in each of P templates."""
    tokens = clip_tokens([t.replace("{c}", c) for c in classes for t in templates])  # [L * P, 77]
    return trim(tokens).unflatten(0, (len(classes), -1))


def captions(data):
    """Returns the token ids [N, P, T] of the P texts that each image may be paired with in pretraining."""
    if data.captions:
        return trim(clip_tokens(data.captions)).unsqueeze(1)
    return prompts(data.classes, data.templates)[data.labels]


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
    root, stamp = Path(source), ""
    if source == "shapes":
        reader = shapes
    elif source == "cifar100" or root.name == "cifar-100-python.tar.gz":
        reader = functools.partial(cifar100, None if source == "cifar100" else root)
    elif source in HUB or (not root.exists() and files.HUB_ID.fullmatch(source)):
        repo = f"clip-benchmark/{HUB[source]}" if source in HUB else source
        reader = functools.partial(webdataset, lambda name: files.hub(repo, name, "datasets/"))
    elif (root / "classnames.txt").is_file():
        reader = functools.partial(webdataset, lambda name: root / name)
    elif (root / "train").is_dir():
        reader = functools.partial(folder, root)
    else:
        raise ValueError(f"--data {source}: unknown. Use shapes, cifar100, {', '.join(HUB)}, a Hub id "
                         "(org/name), or a folder with classnames.txt and train/0.tar, or train/CLASS/*.jpg")
    if root.is_dir():  # if a file changes, the cached images are not used
        source = root = root.resolve()
        stamp = "".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(root.rglob("*")))
    digest = hashlib.sha256(f"{source}{stamp}".encode()).hexdigest()[:16]
    cache = files.CACHE / "images" / f"{Path(source).name}-{split}-{size}-{digest}-v{VERSION}.pt"
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # a damaged file is rebuilt
        return Images(**files.read(cache, lazy=True))
    data = pack(source, split, size, *reader(split))
    files.save(cache, data._asdict())
    return data


def pack(source, split, size, classes, templates, samples, texts=(), keep_small=True):
    """Returns a reader's samples as Images. Raises ValueError that names the sample or class.

    keep_small: whether to keep images at their own size if all are s x s pixels for an s below `size`.
    """
    if not len(samples) or not classes:
        raise ValueError(f"{source}: its {split} split holds no images")
    if invalid := [(name, label) for label, name, _ in samples if not 0 <= label < len(classes)]:
        raise ValueError(f"{invalid[0][0]}: label {invalid[0][1]}, but there are {len(classes)} classes")
    labels = torch.tensor([label for label, _, _ in samples])
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
            return Images(images, labels, list(classes), list(templates), list(texts))
    # The images have several sizes: all of them are resized.
    return pack(source, split, size, classes, templates, samples, texts, keep_small=False)


def read_image(sample, size, keep_small):
    """Returns a sample's image as uint8 [3, S, S]; S is `size`, or less as in `pack`."""
    _, name, open_image = sample
    with files.explain(f"{name}: not a readable image", Exception):  # Pillow raises errors of many classes
        image = open_image()
        w, h = image.size
        return resize_crop(image, w if keep_small and w == h < size else size)


def resize_crop(image, size):
    """Returns a PIL image as uint8 [3, size, size]: bicubic resize of the short side and center crop."""
    image = image.convert("RGB")
    w, h = image.size
    w, h = max(size, size * w // h), max(size, size * h // w)
    if max(w, h) > 1024 * size:  # a strip that would need a lot of memory once it is resized
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels: too elongated")
    image = image.resize((w, h), Image.BICUBIC)
    left, top = round((w - size) / 2), round((h - size) / 2)
    pixels = np.array(image.crop((left, top, left + size, top + size)))  # [S, S, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # here, in the threads of `pack`


def lines(path):
    """Returns the lines of a text file that are not blank."""
    with files.explain(path, UnicodeDecodeError):
        return [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]


def webdataset(fetch, split):
    """Reads clip-benchmark's layout: classnames.txt, zeroshot_classification_templates.txt, SPLIT/i.tar.

    SPLIT/nshards.txt holds the number of tar files, in which KEY.cls is the label of KEY.jpg, .png, or .webp.
    fetch: function from one of these names to the path of the file.
    """
    classes, templates = lines(fetch("classnames.txt")), lines(fetch("zeroshot_classification_templates.txt"))
    file, samples = fetch(f"{split}/nshards.txt"), []
    shards = lines(file)
    if len(shards) != 1 or not shards[0].isdecimal():
        raise ValueError(f"{file}: holds {shards}, not one number")
    for i in range(int(shards[0])):
        path = fetch(f"{split}/{i}.tar")
        members = tar_members(path)
        for name, member in members.items():
            if not name.lower().endswith(SUFFIXES):
                continue
            label = members.get(name.rpartition(".")[0] + ".cls")
            if label is None:
                raise ValueError(f"{path}: {name} has no .cls file beside it")
            text = read_member(path, label)[:20].decode(errors="replace").strip()
            if not text.isdecimal():
                raise ValueError(f"{path}: {label.name} holds {text!r}, not a class number")
            samples.append((int(text), f"{path}: {name}", functools.partial(open_member, path, member)))
    return classes, templates, samples


def tar_members(path):
    """Returns a tar file's regular files, by name. Raises ValueError if it is truncated."""
    damaged = files.explain(f"{path}: damaged or truncated tar", tarfile.TarError)
    with damaged, tarfile.open(path, "r:") as tar:
        members = {member.name: member for member in tar if member.isfile() and not member.issparse()}
        tar.fileobj.seek(tar.offset)  # tarfile silently stops at damage: nothing but the end mark may follow
        rest = tar.fileobj.read(1 << 20)
    if any(rest) or len(rest) < 1024:
        raise ValueError(f"{path}: tar truncated or damaged at byte {tar.offset}")
    return members


def read_member(path, member):
    """Returns the bytes of a member of a tar file; threads may read the same file."""
    with open(path, "rb") as f:
        f.seek(member.offset_data)
        return f.read(member.size)


def open_member(path, member):
    return OPEN(io.BytesIO(read_member(path, member)))


def folder(root, split):
    """Reads root/SPLIT/CLASS/*.jpg, and zeroshot_classification_templates.txt in root if it exists."""
    if not (root / split).is_dir():
        raise FileNotFoundError(f"{root}: no folder {split}; it needs train/CLASS/*.jpg and test/CLASS/*.jpg")
    names = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    if unknown := sorted({p.name for p in (root / split).iterdir() if p.is_dir()} - set(names)):
        raise ValueError(f"{root / split}: {unknown[0]!r} is not a class of {root / 'train'}")
    samples = [(i, path, functools.partial(OPEN, path)) for i, name in enumerate(names)
               for path in sorted((root / split / name).glob("*")) if path.suffix.lower() in SUFFIXES]
    file = root / "zeroshot_classification_templates.txt"
    templates = lines(file) if file.exists() else ["a photo of a {c}."]
    return [name.replace("_", " ") for name in names], templates, samples


def cifar100(path, split):
    """Reads CIFAR-100's python archive. It holds pickles, so its sha256 is checked before it is opened."""
    path = path or files.download(CIFAR_URL, files.CACHE / "cifar-100-python.tar.gz")
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != CIFAR_SHA256:
        raise ValueError(f"{path}: sha256 {digest}, but CIFAR-100's is {CIFAR_SHA256}; download it again")
    with tarfile.open(path) as tar:  # one pass, since seeking back in a .gz file reads it again
        parts = {Path(member.name).name: pickle.load(tar.extractfile(member), encoding="bytes")
                 for member in tar if Path(member.name).name in (split, "meta")}
    table = parts[split]
    pixels = table[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [N, 32, 32, 3]
    samples = [(label, f"{path}: {split} {i}", functools.partial(Image.fromarray, pixels[i]))
               for i, label in enumerate(table[b"fine_labels"])]
    kinds = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    templates = [f"a {kind}photo of {a} {{c}}." for a in ("a", "the") for kind in kinds]
    templates += [f"a photo of {a} {size} {{c}}." for a in ("a", "the") for size in ("small", "big")]
    return [n.decode().replace("_", " ") for n in parts["meta"][b"fine_label_names"]], templates, samples


# The built-in data set: 8 colors x 8 forms. Bases are pretrained on captioned images in white light. The
# train and test splits are in colored light, which shifts every hue: no base knows this without tuning.
HUES = dict(red=0, orange=30, yellow=55, green=120, cyan=180, blue=225, purple=275, pink=325)
# Number of corners; radius of the points between them, radius and offset of the hole, relative to the radius.
FORMS = dict(triangle=(3, 0.5, 0, 0), square=(4, 0.71, 0, 0), pentagon=(5, 0.81, 0, 0), circle=(24, 1, 0, 0),
             star=(5, 0.4, 0, 0), sparkle=(4, 0.3, 0, 0), ring=(24, 1, 0.55, 0), crescent=(24, 1, 0.85, 0.5))
LIGHT = 24  # degrees of hue
COUNTS = dict(captioned=20_000, train=4_000, test=4_000)


def shapes(split):
    """Draws colored shapes; 20% of the captions name a random class, and 40% leave out color or form."""
    rng = random.Random(f"shapes {split}")
    classes = [f"{color} {form}" for color in HUES for form in FORMS]
    templates = ["a photo of a {c}.", "a picture of a {c}.", "there is a {c} here."]
    samples, texts = [], []
    for i in range(COUNTS[split]):
        label = i % len(classes)
        seen = label if rng.random() > 0.2 else rng.randrange(len(classes))
        color, form = classes[seen].split()
        text = rng.choices([classes[seen], form, f"{color} thing", "thing"], [12, 4, 3, 1])[0]
        texts.append(rng.choice(templates).replace("{c}", text))
        light = 0 if split == "captioned" else LIGHT
        image = functools.partial(draw, *classes[label].split(), light, rng.random())
        samples.append((label, f"shapes {i}", image))
    return classes, templates, samples, texts


def draw(color, form, light, seed):
    """Returns a PIL image of 32 x 32 pixels, scaled down from 96 x 96; light: shift of the hue in degrees."""
    rng, size = random.Random(seed), 96
    corners, inner, hole, offset = FORMS[form]
    hue = (HUES[color] + rng.uniform(-8, 8) + light) % 360 / 360
    fill = tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue, rng.uniform(0.55, 1), rng.uniform(0.6, 1)))
    gray = rng.randrange(40, 190)
    ground = tuple(gray + rng.randrange(-25, 25) for _ in range(3))
    image = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        stroke = tuple(rng.randrange(40, 190) for _ in range(3))
        pen.line([rng.uniform(0, size) for _ in range(4)], fill=stroke, width=rng.randrange(2, 6))
    radius, turn = size * rng.uniform(0.28, 0.4), rng.uniform(-0.2, 0.2) - math.pi / 2
    margin = 0.45 * size - radius
    x = size / 2 + rng.uniform(-0.8, 0.8) * margin
    y = size / 2 + rng.uniform(-0.8, 0.8) * margin
    points = [(radius * (inner if i % 2 else 1), turn + math.pi * i / corners) for i in range(2 * corners)]
    pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in points], fill=fill)
    if hole:
        pen.circle((x + offset * radius, y - offset * radius / 2), hole * radius, fill=ground)
    pixels = np.array(image.resize((32, 32), Image.BOX), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 12, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
