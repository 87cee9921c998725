"""Files to models: safetensors, torch.save'd and TorchScript files, OpenCLIP folders, hub ids, checkpoints.

Everything from outside is data: only tensors and plain values are unpickled, sizes are checked before use.
"""
import contextlib
import fcntl
import http.client
import json
import math
import mmap
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from models.clip import CLIP, Classifier

CACHE = Path(os.environ.get("PRT_CACHE", "~/.cache/prt")).expanduser()  # downloads and resized images
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@contextlib.contextmanager
def atomic(path):
    """A binary file that becomes `path` when the block ends well. Otherwise `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            yield f
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def alone():
    """Runs the block in one process of this machine at a time: the first downloads and fills the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # until f is closed
        yield


def save(path, checkpoint):
    """Writes a dict of tensors and plain values (for torch.load, weights_only=True), whole or not at all."""
    try:
        with atomic(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as error:  # torch's own writer hides the OSError of a full disk
        raise OSError(f"{path}: could not be written, the disk may be full ({first_line(error)})") from error


def unfinished(path, resume, settings):
    """What a run that writes to `path` starts from: None, or with resume what an interrupted one left there.

    Raises, before any work is done, where that would overwrite a file or mix two runs' settings.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not Path(path).exists():
        if resume:
            raise FileNotFoundError(f"--resume: there is no {path}")
        return None
    if not resume:
        raise FileExistsError(f"{path} exists: --resume goes on with it, another --out leaves it alone")
    state = read(path)
    if "optimizer" not in state:
        raise ValueError(f"--resume: {path} is no unfinished run (step {state.get('step')} was its last)")
    begun = state.get("args", {})
    for k, v in settings.items():
        if begun.get(k) != v:
            raise ValueError(f"--resume: {path} was begun with --{k} {begun.get(k)}, not {v}")
    return state


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def download(url, path):
    """Fetches url to path, once, with progress, checked against its length. Raises OSError.

    HF_TOKEN goes to the hub's own host alone, as a header that urllib does not carry along a redirect; that
    is why torch.hub.download_url_to_file, which can send no header, does not serve here.
    """
    if path.exists():
        return path
    request = urllib.request.Request(url, headers={"User-Agent": "portable-reward-tuning"})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(endpoint() + "/"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response, atomic(path) as f:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    f.write(chunk)
                    bar.update(len(chunk))
            if total and f.tell() != total:
                raise OSError(f"the connection ended after {f.tell()} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise FileNotFoundError(f"{url}: no such file") from None
        gated = "; misspelt or gated (accept its licence, set HF_TOKEN)" * (error.code in (401, 403))
        raise OSError(f"{url}: HTTP {error.code} {error.reason}{gated}") from None
    except (OSError, http.client.HTTPException) as error:
        why = f"download failed ({first_line(error)}); fetch it elsewhere and put it at {path}"
        raise OSError(f"{url}: {why}") from None
    return path


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub(repo, name, kind=""):
    """The cached path of a hub repository's file, downloaded at need. kind: "" or "datasets/"."""
    return download(f"{endpoint()}/{kind}{repo}/resolve/main/{name}", CACHE / "hub" / (kind + repo) / name)


def read_safetensors(path):
    """name -> tensor over a private memory map: pages are read when used, writes stay in memory."""
    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) if os.path.getsize(path) else b""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise ValueError(f"its header ends at byte {start} of {len(data)}")
        tensors = {}
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if min(shape, default=0) < 0 or not 0 <= begin <= end <= len(data) - start:
                raise ValueError(f"{name}: shape {shape} at bytes {begin} to {end} of {len(data) - start}")
            if count * dtype.itemsize != end - begin:
                raise ValueError(f"{name}: {entry['dtype']} {shape} does not fill {end - begin} bytes")
            if count:
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
            tensors[name] = flat.reshape(shape) if count else torch.empty(shape, dtype=dtype)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file: {error}") from None


def read(path):
    """The dict in a .safetensors, torch.save'd (weights_only=True) or TorchScript file. Raises ValueError."""
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with open(path, "rb") as f:
            names = zipfile.ZipFile(f).namelist() if zipfile.is_zipfile(f) else []
        if any(name.endswith("/constants.pkl") for name in names):  # OpenAI's own files
            return torch.jit.load(path, map_location="cpu").state_dict()
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, not a dict")
        return found
    except OSError:
        raise
    except Exception as error:  # torch names no common class for what a damaged file can raise
        raise ValueError(f"{path}: damaged, truncated or no checkpoint ({first_line(error)})") from None


def architecture(tensors, config):
    """The arch dict of models/clip.py, read off a CLIP state dict's shapes.

    config: open_clip_config.json or {}. It adds what shapes cannot tell: head widths, activation, mean, std.
    """
    model, pre = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    known = ("embed_dim quick_gelu vision_cfg text_cfg image_size layers width patch_size head_width "
             "context_length vocab_size heads").split()
    if strange := [k for part in (model, vision, text) for k, v in part.items() if k not in known and v]:
        raise ValueError(f"open_clip_config.json asks for {', '.join(strange)}, which models/clip.py lacks")

    def count(prefix):
        return len({name[len(prefix):].split(".")[0] for name in tensors if name.startswith(prefix)})

    def heads(width, number):
        if number < 1 or width % number or number % 1:
            raise ValueError(f"a width of {width} does not split into {number:g} heads")
        return int(number)

    for name, n in {"token_embedding.weight": 2, "text_projection": 2, "visual.conv1.weight": 4}.items():
        if tensors[name].ndim != n:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}")
    vocab, text_width = tensors["token_embedding.weight"].shape
    openai = "input_resolution" in tensors  # a key of OpenAI's own files alone
    arch = dict(embed_dim=tensors["text_projection"].shape[1], quick_gelu=model.get("quick_gelu", openai),
                mean=pre.get("mean", CLIP_MEAN), std=pre.get("std", CLIP_STD), text_width=text_width,
                text_layers=count("transformer.resblocks."), context=len(tensors["positional_embedding"]),
                text_heads=heads(text_width, text.get("heads", text_width / 64)), vocab=vocab)
    head_width = vision.get("head_width", 64)
    width, _, _, patch = tensors["visual.conv1.weight"].shape
    if "visual.class_embedding" in tensors:
        grid = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
        return arch | dict(width=width, layers=count("visual.transformer.resblocks."), patch=patch,
                           heads=heads(width, width / head_width), image_size=grid * patch)
    tokens, features = tensors["visual.attnpool.positional_embedding"].shape
    return arch | dict(width=2 * width, layers=[count(f"visual.layer{i}.") for i in (1, 2, 3, 4)],
                       heads=heads(features, features / head_width), image_size=32 * math.isqrt(tokens - 1))


def fill(model, tensors):
    """Gives a model built on the meta device its tensors, float32, strictly, and puts it into eval mode."""
    torch.tensor([model.arch["mean"], model.arch["std"]]).view(2, 3)  # raises where it is no pair of threes
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(True)


ROLES = dict(clip="a base (a whole CLIP)", prt="a reward", ft="a fine-tuned classifier")


def load(source, role=None):
    """A model in eval mode, float32 on the CPU, its plain values in model.info, from whatever `source` names:

    the project's own checkpoint, an OpenCLIP folder (open_clip_config.json + open_clip_model.safetensors or
    open_clip_pytorch_model.bin) or hub id org/name of that layout, a bare CLIP state dict (.pt,
    .safetensors), or OpenAI's TorchScript .pt. role: what it must be, a key of ROLES. Raises ValueError or
    OSError naming the file.
    """
    source, path, config = str(source), Path(source), {}
    if not path.exists():
        if not HUB_ID.fullmatch(source) or path.suffix in (".pt", ".bin", ".safetensors"):
            raise FileNotFoundError(f"{source}: no such file or folder, and no hub id (org/name) either")
        path = hub(source, "open_clip_config.json").parent
        try:
            (path / "open_clip_pytorch_model.bin").exists() or hub(source, "open_clip_model.safetensors")
        except FileNotFoundError:
            hub(source, "open_clip_pytorch_model.bin")
    if path.is_dir():
        try:
            config = json.loads((path / "open_clip_config.json").read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}/open_clip_config.json: {error}") from None
        path /= "open_clip_model.safetensors"
        path = path if path.exists() else path.with_name("open_clip_pytorch_model.bin")
    found = read(path)
    try:
        model = own(found) if "kind" in found else clip_from(found, config, path)
        found_role = ROLES[model.info.get("method", model.info["kind"])]
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        why = " ".join(str(error).split())[:400]
        raise ValueError(f"{path}: no CLIP and no checkpoint of this project: {why}") from None
    if role and ROLES[role] != found_role:
        raise ValueError(f"{source} is {found_role}; {ROLES[role]} is needed here")
    return model


def clip_from(found, config, path):
    """The CLIP in a state dict, bare or under "state_dict" as OpenCLIP's training saves it."""
    tensors = {k.removeprefix("module."): v for k, v in found.get("state_dict", found).items()}
    arch = architecture(tensors, config)
    if not config and not arch["quick_gelu"]:
        print(f"{path}: a bare state dict does not tell activation and pixel mean: GELU, CLIP's mean taken")
    for name in ("input_resolution", "context_length", "vocab_size"):
        tensors.pop(name, None)
    with torch.device("meta"):
        model = CLIP(arch)
    model.info = dict(kind="clip")
    return fill(model, tensors)


def own(checkpoint):
    """The model in a checkpoint of `fit`: kind "clip" (both towers) or "classifier" (image tower, head)."""
    arch, tensors = checkpoint["arch"], checkpoint["model"]
    layers = arch["layers"] if isinstance(arch["layers"], list) else [arch["layers"]]
    if max(layers) > len(tensors):  # else a damaged number builds modules for hours
        raise ValueError(f"{layers} layers in {len(tensors)} tensors")
    with torch.device("meta"):
        model = CLIP(arch) if checkpoint["kind"] == "clip" else Classifier(arch, tensors["head"])
    model.info = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    return fill(model, tensors)
