"""Downloads from the Hugging Face Hub and elsewhere, kept in the cache."""
import contextlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from data import files

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OWN = re.compile(r"(.+\.py):\w+")  # file.py:function, see models/own.py


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub(repo, name, kind=""):
    """Returns the path of a cached Hub file, downloaded if needed; kind: "" (models) or "datasets/"."""
    path = files.CACHE / "hub" / (kind + repo) / name
    return download(f"{endpoint()}/{kind}{repo}/resolve/main/{name}", path)


def locate(source):
    """Returns whether a source is a file or folder. Raises FileNotFoundError if it is no Hub id, either."""
    is_local = Path(OWN.fullmatch(source)[1] if OWN.fullmatch(source) else source).exists()
    if not is_local and (not HUB_ID.fullmatch(source) or source.endswith((".pt", ".bin", ".safetensors"))):
        raise FileNotFoundError(f"{source}: no such file or folder, and not a Hub id (org/name) either")
    return is_local


def find(source, *names):
    """Returns the path of the first of these files that a folder, or the cache or the Hub for a Hub id, has.

    Raises FileNotFoundError that names the source.
    """
    is_local = locate(source)
    folder = Path(source) if is_local else files.CACHE / "hub" / source
    for name in names:
        if (folder / name).exists():
            return folder / name
    for name in [] if is_local else names:  # only files of a Hub id can be downloaded
        with contextlib.suppress(FileNotFoundError):
            return hub(source, name)
    raise FileNotFoundError(f"{source}: holds no {' and no '.join(names)}")


def optional(source, name, *beside):
    """Returns the path of a file that a source may have, or None. Call it before any of `beside` is found.

    A file of a Hub id is asked for only until one of `beside` is in the cache.
    """
    with contextlib.suppress(FileNotFoundError):
        if (path := find(source, name, *beside)).name == name:
            return path
    return None


def download(url, path):
    """Downloads url to path unless that exists, checks its length, and returns path.

    One process downloads at a time, and those that wait for the same file take it. Raises OSError that says
    what to do, and FileNotFoundError for status 404.

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
        with files.lock_cache():
            if path.exists():
                return path
            with opener.open(request, timeout=30) as response, files.atomic(path) as f:
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
                    with files.explain("the server sent damaged JSON", ValueError, RecursionError):
                        json.load(f)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise FileNotFoundError(f"{url}: no such file") from None
        hint = ""
        if error.code in (401, 403):
            hint = f"; misspelled, or gated: accept the license at {url.split('/resolve/')[0]}, set HF_TOKEN"
        raise OSError(f"{url}: HTTP {error.code}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = files.first_line(error)
        raise OSError(f"{url}: download failed ({reason}); save the file as {path} by other means") from None
    return path


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and drops HF_TOKEN if they lead to another scheme, host, or port."""

    def redirect_request(self, request, *details):
        """Returns the redirected request; urllib calls this method by its name."""
        redirected = super().redirect_request(request, *details)
        if urlsplit(redirected.full_url)[:2] != urlsplit(request.full_url)[:2]:
            redirected.headers.pop("Authorization", None)
        return redirected
