"""Reading and writing files: opening, atomic writes, locks, torch files, safetensors, JSON, and gzip.

Files from outside are data, not code, and are read whole or refused. `open_file` opens all of them.
"""
import codecs
import contextlib
import fcntl
import gzip
import io
import json
import math
import mmap
import os
import pickletools
import re
import stat
import sys
import zipfile
from pathlib import Path

import torch

CACHE = Path(os.environ.get("PRT_CACHE") or "~/.cache/prt").expanduser()  # downloads and resized images
# What reading a damaged or foreign file can raise.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)
# All that the pickle in a file of torch.save may call: what makes dense tensors, and a dict.
CALLS = re.compile(r"torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|"
                   r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict")


def open_file(path):
    """Opens a regular file to read bytes. Raises ValueError for a folder, a pipe, or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to does not block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: a folder, a pipe, or a device; a file is needed")
    return os.fdopen(descriptor, "rb")


def read_bytes(path):
    with open_file(path) as f:
        return f.read()


def read_text(path):
    """Returns the text of a UTF-8 file. Raises ValueError that names the file."""
    with explain(path, UnicodeDecodeError):
        return read_bytes(path).decode("utf-8-sig")


def gunzip(data, ratio):
    """Returns the content of gzip's bytes. Raises ValueError if that is suspiciously large."""
    limit = 2**24 + ratio * len(data)
    content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it expands to more than {limit:,} bytes")
    return content


@contextlib.contextmanager
def atomic(path):
    """Opens a binary file that replaces `path` if the with block succeeds; otherwise `path` is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # the same in the next run, if this one is killed
    with lock(part, wait=False):
        try:
            with open(part, "w+b") as f:
                yield f
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def lock(path, wait=True):
    """Runs the with block in one process at a time of those that lock this file, which is made if needed.

    wait: if False, raises BlockingIOError if another process has locked it.
    """
    # To read, since another user may own it. O_NONBLOCK: no pipe of this name blocks.
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
    with os.fdopen(descriptor):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except BlockingIOError:
            if not wait:
                raise BlockingIOError(f"{path}: another process, or run, is writing this file") from None
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all processes of torchrun
                sys.stderr.write(f"waiting for another process, which has locked {path}\n")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def lock_cache(name="lock"):
    """Returns a context: one process runs the with block at a time, so that the first one fills the cache.

    name: of the file that is locked: "lock" while a file is downloaded, and "images.lock" while images are
    read and resized, which may download them.
    """
    with contextlib.suppress(OSError):
        CACHE.mkdir(parents=True, exist_ok=True)
    file = CACHE / name  # it may be another user's; without write access, there is nothing to lock
    usable = os.access(CACHE, os.W_OK) and (not file.exists() or os.access(file, os.R_OK))
    return lock(file) if usable else contextlib.nullcontext()


@contextlib.contextmanager
def explain(prefix, *kinds):
    """Turns an error of these kinds in the with block into a ValueError that begins with prefix."""
    try:
        yield
    except kinds as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{prefix}: {first_line(error):.400}") from None


def first_line(error):
    """Returns an error's first sentence, without the stack or the advice that may follow it."""
    return re.split(r"\. (?=[A-Z])", (str(error).strip() or type(error).__name__).splitlines()[0])[0]


def save(path, tensors):
    """Writes a dict of tensors and plain values atomically. Raises OSError that names the file."""
    try:
        with atomic(path) as f:
            torch.save(tensors, f)
    except (OSError, RuntimeError) as error:  # torch's own writer turns what f.write raises into RuntimeError
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None  # a signal ended the program
        raise OSError(f"{path}: could not be written; the disk may be full ({first_line(error)})") from error


def read(path):
    """Returns the dict of a .safetensors file, or of a file of torch.save, of which nothing is run.

    Tensors are mapped into memory: they are read on first use, processes that read one file share them, and
    writing to them changes no file. Raises ValueError if the file is damaged.
    """
    # torch has no common class for what a damaged file can raise.
    with open_file(path) as f, explain(f"{path}: damaged, truncated, or not a checkpoint", Exception):
        if Path(path).suffix == ".safetensors":
            return read_safetensors(f)
        if f.read(2) == b"\x1f\x8b":  # gzip: a ticket
            f.seek(0)
            return read_archive(io.BytesIO(gunzip(f.read(), ratio=200)))  # 200: masks of 1 in 3,000 ones
        return read_archive(f, f"/dev/fd/{f.fileno()}")  # not `path`, which may be another file by now


def read_archive(f, path=None):
    """Returns the dict of a file of torch.save, whose checksums, sizes, and function calls are checked.

    path: of the open file f, whose tensors are then mapped into memory.
    """
    with zipfile.ZipFile(f) as archive:
        parts = archive.infolist()
        names = [part.filename for part in parts]
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("a TorchScript archive, which would run its own code; take the same weights in "
                             "OpenCLIP's layout, such as timm/vit_base_patch16_clip_224.openai")
        if any(part.compress_type for part in parts) or len({*names}) < len(names):
            raise ValueError("its parts are compressed, or have the same name")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not match its checksum")
        pickle, = (name for name in names if name.endswith("/data.pkl"))
        for code, call, _ in pickletools.genops(archive.read(pickle)):
            if ("GLOBAL" in code.name or code.name == "INST") and not CALLS.fullmatch(str(call)):
                raise ValueError(f"it holds {call!s:.80}; dense tensors and plain values are allowed")
    f.seek(0)
    content = torch.load(path or f, "cpu", weights_only=True, mmap=path is not None)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not a dict")
    tensors = all_tensors(content, set())
    storages = {x.data_ptr(): x for x in (tensor.untyped_storage() for tensor in tensors)}
    found = sorted(x.nbytes() for x in storages.values() if x.nbytes())
    if found != sorted(x.file_size for x in parts if "/data/" in x.filename and x.file_size):
        raise ValueError("the sizes of its tensors are not those of its parts")
    if sum(x.nbytes for x in tensors) > sum(found):
        raise ValueError("its tensors are larger than the file")
    return content


def all_tensors(x, seen):
    """Returns the tensors in nested dicts, lists, and tuples. seen: a set of ids, of what was visited."""
    if isinstance(x, torch.Tensor):
        return [x]
    if id(x) in seen or not isinstance(x, (dict, list, tuple)):
        return []
    seen.add(id(x))
    return [t for part in (x.values() if isinstance(x, dict) else x) for t in all_tensors(part, seen)]


def read_safetensors(f):
    """Returns name -> tensor from a private memory map."""
    data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError(f"its header ends at byte {start} of {len(data)}")
    header = parse_json(data[8:start])
    header.pop("__metadata__", None)
    ends = sorted(x for entry in header.values() for x in entry["data_offsets"])
    if [0, *ends[1::2]] != [*ends[::2], len(data) - start]:  # each tensor begins where another one ends
        raise ValueError("its tensors overlap, or leave bytes out")
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
    """Returns the dict of a JSON file. Raises ValueError that names it."""
    with explain(f"{path}: not JSON", ValueError, RecursionError):
        content = parse_json(read_bytes(path).removeprefix(codecs.BOM_UTF8))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, where there must be an object")
        return content


def parse_json(text):
    """Returns the content of JSON text. Raises ValueError if it is damaged, or an object has a key twice."""
    return json.loads(text, object_pairs_hook=unique)


def unique(pairs):
    """Returns a dict of pairs. Raises ValueError if a key stands twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(content):.100}")
    return content


def write_lines(path, rows):
    """Writes dicts as lines of JSON."""
    with atomic(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
