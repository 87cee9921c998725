"""Readers of image files: clip-benchmark's WebDataset layout, and a folder of images for each class."""
import functools
import io
import tarfile
from pathlib import Path

from PIL import Image

from data import files, hub

HUB = dict(caltech101="wds_vtab-caltech101", flowers="wds_vtab-flowers", resisc45="wds_vtab-resisc45",
           cars="wds_cars", aircraft="wds_fgvc_aircraft", country211="wds_country211")  # of clip-benchmark
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OPEN = functools.partial(Image.open, formats=("JPEG", "PNG", "WEBP", "BMP"))  # PostScript would run code


def reader(source):
    """Returns the function that reads a split of a data set: a key of HUB, a Hub id, or a folder.

    Raises ValueError if it is none of them.
    """
    root = Path(source)
    if source in HUB or (not root.exists() and hub.HUB_ID.fullmatch(source)):
        repo = f"clip-benchmark/{HUB[source]}" if source in HUB else source
        return functools.partial(webdataset, lambda name: hub.hub(repo, name, "datasets/"))
    if (root / "classnames.txt").is_file():
        return functools.partial(webdataset, lambda name: root / name)
    if (root / "train").is_dir():
        return functools.partial(folder, root)
    raise ValueError(f"--data {source}: unknown. Use shapes, cifar100, {', '.join(HUB)}, a Hub id "
                     "(org/name), or a folder with classnames.txt and train/0.tar, or train/CLASS/*.jpg")


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
