"""File input and output: atomic writes, downloads, the Hugging Face Hub, safetensors, and torch files.

Files from outside are data, not code: unpickling is limited to tensors and plain values.
"""
import contextlib
import fcntl
import gzip
import http.client
import io
import json
import math
import mmap
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

CACHE = Path(os.environ.get("PRT_CACHE", "~/.cache/prt")).expanduser()  # downloads and resized images
# What reading a damaged or foreign file can raise.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
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


@contextlib.contextmanager
def lock():
    """Runs the with block in one process of this machine at a time, so that the first fills the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # until f is closed
        yield


def save(path, tensors, compress=False):
    """Writes a dict of tensors and plain values atomically. Raises OSError that names the file."""
    try:
        with atomic(path) as f:
            if compress:
                with gzip.GzipFile("", "wb", fileobj=f, mtime=0) as z:  # no name and time: the same bytes
                    torch.save(tensors, z)
            else:
                torch.save(tensors, f)
    except (OSError, RuntimeError) as error:  # torch's own writer hides the OSError of a full disk
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None  # a signal ended the program
        raise OSError(f"{path}: could not be written; the disk may be full ({first_line(error)})") from error


def read(path, lazy=False):
    """Returns the dict in a .safetensors file, a file of torch.save or `save`, or a TorchScript archive.

    Unpickles with weights_only=True. lazy: a file of torch.save is read on first use of its tensors, unless
    it is compressed. Raises ValueError if the file is damaged.
    """
    # torch has no common class for what a damaged file can raise.
    with open(path, "rb") as f, explain(f"{path}: damaged, truncated, or not a checkpoint", Exception):
        if Path(path).suffix == ".safetensors":
            return read_safetensors(f)
        names = zipfile.ZipFile(f).namelist() if zipfile.is_zipfile(f) else []
        if any(name.endswith("/constants.pkl") for name in names):  # OpenAI's own files
            return torch.jit.load(path, map_location="cpu").state_dict()
        f.seek(0)
        compressed = f.read(2) == b"\x1f\x8b"  # as every gzip file begins
        content = torch.load(decompress(f) if compressed else path, map_location="cpu", weights_only=True,
                             mmap=lazy and not compressed)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dict")
        return content


def decompress(f):
    """Returns a file in memory with the content of a gzip file. Raises ValueError if it is too large."""
    f.seek(0)
    limit = 2**20 + 200 * os.fstat(f.fileno()).st_size  # masks, with a share of ones above 0.0003
    content = gzip.GzipFile(fileobj=f).read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it expands to more than {limit} bytes")
    return io.BytesIO(content)


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


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub(repo, name, kind=""):
    """Returns the path of a cached Hub file, downloaded if needed; kind: "" (models) or "datasets/"."""
    return download(f"{endpoint()}/{kind}{repo}/resolve/main/{name}", CACHE / "hub" / (kind + repo) / name)


def download(url, path):
    """Downloads url to path unless that exists, checks its length, and returns path.

    Raises OSError that says what to do, and FileNotFoundError for status 404.

    A web page or damaged JSON, which a proxy may send with status 200, is refused and not kept. HF_TOKEN is
    sent to the scheme, host, and port of the Hub only, also after redirects. (The function
    torch.hub.download_url_to_file cannot send a header.)
    """
    if path.exists():
        return path
    request = urllib.request.Request(url, headers={"User-Agent": "portable-reward-tuning"})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(endpoint() + "/"):
        if len(token.split()) > 1:  # http.client would quote it in its error
            raise ValueError("HF_TOKEN holds a space or a line break")
        request.add_header("Authorization", f"Bearer {token}")
    try:
        opener = urllib.request.build_opener(Redirect)
        with opener.open(request, timeout=30) as response, atomic(path) as f:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(response, "read", total, desc=path.name, disable=None) as stream:
                shutil.copyfileobj(stream, f)
            if total and f.tell() != total:
                raise OSError(f"the connection ended after {f.tell()} of {total} bytes")
            f.seek(0)
            start = f.read(200).lstrip()
            if start[:9].lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
                raise OSError(f"the server sent a web page, {start[:60]}")
            if path.suffix == ".json":
                f.seek(0)
                with explain("the server sent damaged JSON", ValueError, RecursionError):
                    json.load(f)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise FileNotFoundError(f"{url}: no such file") from None
        hint = ""
        if error.code in (401, 403):
            hint = f"; misspelled, or gated: accept the license at {url.split('/resolve/')[0]}, set HF_TOKEN"
        raise OSError(f"{url}: HTTP {error.code}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: download failed ({first_line(error)}); save the file as {path} by other means"
                      ) from None
    return path


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and drops HF_TOKEN if they lead to another scheme, host, or port."""

    def redirect_request(self, request, *details):
        """Returns the redirected request; urllib calls this method by its name."""
        redirected = super().redirect_request(request, *details)
        if urlsplit(redirected.full_url)[:2] != urlsplit(request.full_url)[:2]:
            redirected.headers.pop("Authorization", None)
        return redirected


def first_line(error):
    """Returns an error's first sentence, without the stack or the advice that may follow it."""
    return re.split(r"\. (?=[A-Z])", (str(error).strip() or type(error).__name__).splitlines()[0])[0]
