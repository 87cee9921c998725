"""Readers of image files: clip-benchmark's WebDataset layout, and a folder of images for each class."""
import io
import os
import re
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from data import files, hub
from data.images import Sample

HUB = dict(caltech101="wds_vtab-caltech101", flowers="wds_vtab-flowers", resisc45="wds_vtab-resisc45",
           cars="wds_cars", aircraft="wds_fgvc_aircraft", country211="wds_country211")  # of clip-benchmark
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OPEN = partial(Image.open, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"))  # PostScript would run code


def reader(source):
    """Returns the function that reads a split of a data set: a key of HUB, a Hub id, or a folder.

    Raises ValueError if it is none of them.
    """
    root = Path(source)
    if source in HUB or (not root.exists() and hub.HUB_ID.fullmatch(source)):
        repo = f"clip-benchmark/{HUB[source]}" if source in HUB else source
        return partial(webdataset, lambda name: hub.hub(repo, name, "datasets/"))
    if (root / "classnames.txt").is_file():
        return partial(webdataset, lambda name: root / name)
    if (root / "train").is_dir():
        return partial(folder, root)
    if root.is_dir():
        raise ValueError(f"--data {source}: has no folder train: sort its images into train/CLASS/*.jpg and "
                         "test/CLASS/*.jpg (or is it clip-benchmark's? Then classnames.txt is missing)")
    raise ValueError(f"--data {source}: unknown. Use shapes, cifar100, {', '.join(HUB)}, a Hub id "
                     "(org/name), or a folder with classnames.txt and train/0.tar, or train/CLASS/*.jpg")


def lines(path):
    """Returns the lines of a text file, without blank ones at its end."""
    return [line.strip() for line in files.read_text(path).rstrip().split("\n")]


def classes_in(path):
    """Returns the class names in a text file. Raises ValueError if one is blank: the others might move up."""
    found = lines(path)
    if "" in found:
        raise ValueError(f"{path}: line {found.index('') + 1} is blank, which leaves a class without a name")
    return found


def templates_in(path):
    """Returns the templates in a text file. Raises ValueError if one has no place for the class name."""
    found = [line for line in lines(path) if line] or [""]
    if wrong := [line for line in found if "{c}" not in line]:
        raise ValueError(f"{path}: {wrong[0]!r:.80} has no {{c}}, which stands for the name of the class")
    return found


def report_skipped(source, skipped):
    """Prints how many files were not read; skipped: Counter of their suffixes."""
    if skipped:
        kinds = ", ".join(f"{kind or 'no suffix'} {n}" for kind, n in skipped.most_common(5))
        print(f"{source}: {skipped.total()} files not read: {kinds} (JPEG, PNG, WebP, BMP, GIF, TIFF are)")


def webdataset(fetch, split):
    """Reads clip-benchmark's layout: classnames.txt, zeroshot_classification_templates.txt, SPLIT/i.tar.

    SPLIT/nshards.txt holds the number of tar files, in which KEY.cls is the label of KEY.jpg, .png, or .webp.
    fetch: function from one of these names to the path of the file.
    """
    classes = classes_in(fetch("classnames.txt"))
    templates = templates_in(fetch("zeroshot_classification_templates.txt"))
    file, samples, skipped = fetch(f"{split}/nshards.txt"), [], Counter()
    shards = lines(file)
    if len(shards) != 1 or not re.fullmatch(r"\d{1,6}", shards[0]):
        raise ValueError(f"{file}: holds {shards}, not one number")
    for i in range(int(shards[0])):
        path = fetch(f"{split}/{i}.tar")
        members = tar_members(path, skipped)
        for name, member in members.items():
            suffix = PurePosixPath(name).suffix.lower()
            if suffix not in SUFFIXES:
                skipped.update([suffix] if suffix != ".cls" else [])
                continue
            label = members.get(name.rpartition(".")[0] + ".cls")
            if label is None:
                raise ValueError(f"{path}: {name} has no .cls file beside it")
            text = read_member(path, label)[:20].decode(errors="replace").strip()
            if not text.isdecimal():
                raise ValueError(f"{path}: {label.name} holds {text!r}, not a class number")
            samples.append(Sample(int(text), f"{path}: {name}", partial(open_member, path, member), path))
    report_skipped(file.parent, skipped)
    return classes, templates, samples


def tar_members(path, skipped):
    """Returns a tar file's regular files by name, and counts links in `skipped`.

    Raises ValueError if the file is damaged, or a name stands twice.
    """
    damaged = files.explain(f"{path}: damaged or truncated tar", tarfile.TarError, OverflowError)
    with files.open_file(path) as f, damaged, tarfile.open(fileobj=f, mode="r:") as tar:
        everything = [member for member in tar if not member.isdir()]
        found = [member for member in everything if member.isfile() and not member.issparse()]
        skipped.update(["links"] * (len(everything) - len(found)))
        if len({x.name for x in found}) < len(found):
            name, n = Counter(x.name for x in found).most_common(1)[0]
            raise ValueError(f"{path}: holds {n} files {name}")
        f.seek(tar.offset)  # tarfile silently stops at damage: nothing but the end mark may follow
        rest = f.read(1 << 20)
    if any(rest) or len(rest) < 1024:
        raise ValueError(f"{path}: tar truncated or damaged at byte {tar.offset}")
    return {x.name: x for x in found if not any(part[0] == "." for part in PurePosixPath(x.name).parts)}


def read_member(path, member):
    """Returns the bytes of a member of a tar file; threads may read the same file."""
    with files.open_file(path) as f:
        f.seek(member.offset_data)
        return f.read(member.size)


def open_member(path, member):
    return OPEN(io.BytesIO(read_member(path, member)))


def open_image(path):
    return OPEN(io.BytesIO(files.read_bytes(path)))


def folder(root, split):
    """Reads root/SPLIT/CLASS/*.jpg, and zeroshot_classification_templates.txt in root if it exists."""
    for name in ("train", "test"):  # both, before the images of one are read
        if not (root / name).is_dir():
            raise FileNotFoundError(f"{root}: no folder {name}; it needs train/CLASS/*.jpg and "
                                    "test/CLASS/*.jpg")
    names = [path.name for path in visible(root / "train") if path.is_dir()]
    samples, skipped = [], Counter()
    for path in visible(root / split):
        if not path.is_dir():
            skipped[path.suffix.lower()] += 1
            continue
        if path.name not in names:
            raise ValueError(f"{root / split}: {path.name!r} is not a class of {root / 'train'}")
        for file in visible(path):
            if file.suffix.lower() in SUFFIXES:
                samples.append(Sample(names.index(path.name), file, partial(open_image, file), file))
            else:
                skipped["folders" if file.is_dir() else file.suffix.lower()] += 1
    report_skipped(root / split, skipped)
    file = root / "zeroshot_classification_templates.txt"
    templates = templates_in(file) if os.path.lexists(file) else ["a photo of a {c}."]
    return [name.replace("_", " ") for name in names], templates, samples


def visible(path):
    """Returns the sorted entries of a folder without hidden ones, such as .ipynb_checkpoints."""
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
