"""Reading and writing files: atomic writes, locks, torch files, safetensors, and JSON.

Files from outside are data, not code: unpickling is limited to tensors and plain values.
"""
import contextlib
import fcntl
import json
import math
import mmap
import os
import re
import zipfile
from pathlib import Path

import torch

CACHE = Path(os.environ.get("PRT_CACHE", "~/.cache/prt")).expanduser()  # downloads and resized images
# What reading a damaged or foreign file can raise.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


@contextlib.contextmanager
def atomic(path):
    """Opens a binary file that replaces `path` if the with block succeeds; otherwise `path` is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w+b") as f:
            yield f
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def explain(prefix, *kinds):
    """Turns an error of these kinds in the with block into a ValueError that begins with prefix."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{prefix}: {first_line(error):.400}") from None


def first_line(error):
    """Returns an error's first sentence, without the stack or the advice that may follow it."""
    return re.split(r"\. (?=[A-Z])", (str(error).strip() or type(error).__name__).splitlines()[0])[0]


@contextlib.contextmanager
def lock():
    """Runs the with block in one process of this machine at a time, so that the first fills the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # until f is closed
        yield


def save(path, tensors):
    """Writes a dict of tensors and plain values atomically. Raises OSError that names the file."""
    try:
        with atomic(path) as f:
            torch.save(tensors, f)
    except (OSError, RuntimeError) as error:  # torch's own writer turns what f.write raises into RuntimeError
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None  # a signal ended the program
        raise OSError(f"{path}: could not be written; the disk may be full ({first_line(error)})") from error


def read(path, lazy=False):
    """Returns the dict in a .safetensors file or a file of torch.save, read with weights_only=True.

    lazy: a file of torch.save is read on first use of its tensors. Raises ValueError if the file is damaged.
    """
    # torch has no common class for what a damaged file can raise.
    with open(path, "rb") as f, explain(f"{path}: damaged, truncated, or not a checkpoint", Exception):
        if Path(path).suffix == ".safetensors":
            return read_safetensors(f)
        names = zipfile.ZipFile(f).namelist() if zipfile.is_zipfile(f) else []
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("a TorchScript archive, which would run its own code; take the same weights in "
                             "OpenCLIP's layout, such as timm/vit_base_patch16_clip_224.openai")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dict")
        return content


def read_safetensors(f):
    """Returns name -> tensor from a private memory map: reads on first use, and never writes to the file."""
    data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError(f"its header ends at byte {start} of {len(data)}")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: safetensors_entry(data, start, name, **entry) for name, entry in header.items()}


def safetensors_entry(data, start, name, dtype, shape, data_offsets):
    """Returns one tensor of a safetensors file; arguments from `dtype` on are its header entry."""
    (begin, end), count = data_offsets, math.prod(shape)
    fits = 0 <= begin <= end <= len(data) - start and count * DTYPES[dtype].itemsize == end - begin
    if min(shape, default=0) < 0 or not fits:
        raise ValueError(f"{name}: {dtype} {shape} is not bytes {begin} to {end} of {len(data) - start}")
    if not count:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype], count=count, offset=start + begin).reshape(shape)


def read_json(path):
    """Returns the content of a JSON file. Raises ValueError that names it."""
    with explain(f"{path}: not JSON", ValueError, RecursionError):
        return json.loads(Path(path).read_text("utf-8"))
