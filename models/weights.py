"""Files to models: safetensors, torch.save'd and TorchScript files, folders, hub ids, checkpoints.

Everything from outside is data: only tensors and plain values are unpickled, sizes are checked before use.
"""
import argparse
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
from models.gpt import GPT
from models.tokenizer import Tokenizer

CACHE = Path(os.environ.get("PRT_CACHE", "~/.cache/prt")).expanduser()  # downloads and resized images
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FIXED = ("base", "data", "method", "out", "size")  # what a recipe of `stages` alone decides
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


def settings(args):
    """The arguments that a run's result depends on; its checkpoint keeps them.

    Tuning may go on with another --accum, as the number of processes asks for it. Not so `pretrain`, which
    contrasts the images of a micro-batch.
    """
    free = {"resume", "device", "compile", "out"} | ({"accum"} if args.method != "pretrain" else set())
    return {k: v for k, v in vars(args).items() if k not in free}


def unfinished(args):
    """What a run that writes to args.out starts from: None, or with --resume what an interrupted one left.

    Raises, before any work is done, where that would overwrite a file or mix two runs' settings.
    """
    path = args.out
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not Path(path).exists():
        if args.resume:
            raise FileNotFoundError(f"--resume: there is no {path}")
        return None
    if not args.resume:
        raise FileExistsError(f"{path} exists: --resume goes on with it, another --out leaves it alone")
    state = read(path)
    if "optimizer" not in state:
        raise ValueError(f"--resume: {path} is no unfinished run (step {state.get('step')} was its last)")
    begun = state.get("args", {})
    for k, v in settings(args).items():
        if begun.get(k) != v:
            flag = k.replace("_", "-")
            raise ValueError(f"--resume: {path} was begun with --{flag} {begun.get(k)}, not {v}")
    return state


def stages(recipes, args, folder, train):
    """Makes folder/NAME.pt for each recipe by train(its arguments), unless a finished one is there.

    recipes: name -> arguments, base being the name of an earlier one. What args sets itself has precedence.
    Returns name -> path.
    """
    paths = {name: f"{Path(folder) / name}.pt" for name in recipes}
    given = {k: v for k, v in vars(args).items() if v is not None}
    for name, recipe in recipes.items():
        fixed = recipe | dict(out=paths[name], base=paths.get(recipe.get("base")))
        run = argparse.Namespace(**vars(args) | recipe | given | {k: fixed[k] for k in FIXED if k in fixed})
        found = read(run.out) if Path(run.out).exists() else {}
        if found and "optimizer" not in found:
            if found.get("args") != settings(run):
                raise ValueError(f"{run.out} was made with other arguments; name another --out")
            print(f"{run.out} is kept")
        else:
            run.resume = bool(found)
            train(run)
    return paths


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
        hint = f"; misspelt, or gated: accept the licence at {url.split('/resolve/')[0]}, set HF_TOKEN"
        raise OSError(f"{url}: HTTP {error.code}{hint * (error.code in (401, 403))}") from None
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


GPT2_NAMES = {"wte.": "embed_tokens.", "wpe.": "embed_positions.", "ln_f.": "norm.", "h.": "layers.",
              "ln_1.": "input_layernorm.", "ln_2.": "post_attention_layernorm.", "mlp.c_fc.": "mlp.up_proj.",
              "mlp.c_proj.": "mlp.down_proj.", "attn.c_proj.": "self_attn.o_proj."}
# What models/gpt.py calls by one name goes by these keys of a config.json.
GPT_KEYS = dict(family="model_type", vocab="vocab_size", width="hidden_size n_embd", end="eos_token_id",
                layers="num_hidden_layers n_layer", heads="num_attention_heads n_head", head_width="head_dim",
                kv_heads="num_key_value_heads", mlp="intermediate_size n_inner", tied="tie_word_embeddings",
                positions="max_position_embeddings n_positions", eps="rms_norm_eps layer_norm_epsilon")
GPT_KNOWN = dict(model_type=("gpt2", "llama", "qwen2"), hidden_act=("silu",), mlp_bias=(False,),
                 activation_function=("gelu_new",), attention_bias=(False,), use_sliding_window=(False,),
                 scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), quantization_config=())


def gpt_architecture(config):
    """The arch dict of models/gpt.py in a Hugging Face config.json, with RoPE keys of the old or new form."""
    if odd := [k for k, known in GPT_KNOWN.items() if k in config and config[k] not in known]:
        raise ValueError("models/gpt.py has gpt2, llama (Falcon3 too) and qwen2, but not "
                         + ", ".join(f"{k} {config[k]}" for k in odd))
    arch = {ours: next((config[k] for k in theirs.split() if config.get(k) is not None), None)
            for ours, theirs in GPT_KEYS.items()}
    optional = ("end", "head_width", "kv_heads", "mlp", "tied")
    if missing := [GPT_KEYS[k] for k, v in arch.items() if v is None and k not in optional]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    gpt2, end = arch["family"] == "gpt2", arch["end"]
    defaults = dict(kv_heads=arch["heads"], head_width=arch["width"] // arch["heads"],
                    mlp=4 * arch["width"], tied=gpt2)
    arch |= {k: v for k, v in defaults.items() if arch[k] is None}
    old = dict(rope_theta=config.get("rope_theta", 10000.0)) | (config.get("rope_scaling") or {})
    rope = config.get("rope_parameters") or old
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind}; models/gpt.py has default and llama3")
    rope = dict(theta=rope["rope_theta"], llama3=rope if kind == "llama3" else None)
    return arch | dict(rope=None if gpt2 else rope, end=end[0] if isinstance(end, list) else end)


def gpt_tensors(tensors, arch):
    """A Hugging Face GPT's tensors under the names, and in the shapes, of models/gpt.py."""
    found = {}
    for name, x in tensors.items():
        name = name.removeprefix("transformer.").removeprefix("model.")
        if name.endswith((".attn.bias", ".attn.masked_bias", ".inv_freq")):  # buffers of old files
            continue
        if name == "lm_head.weight" and arch["tied"]:
            continue
        if arch["family"] == "gpt2":
            x = x.T.contiguous() if ".c_" in name and x.ndim == 2 else x  # it stores [inputs, outputs]
            for old, new in GPT2_NAMES.items():
                name = name.replace(old, new)
        parts = x.chunk(3) if ".c_attn." in name else [x]
        found |= {name.replace("attn.c_attn", f"self_attn.{p}_proj"): y for p, y in zip("qkv", parts)}
    return found


def same_vocabulary(models):
    """The tokenizer that GPTs share, to whose size padded output matrices are cut; models: name -> GPT.

    Raises ValueError where the tokenizers differ, or one has more tokens than a matrix rows.
    """
    tokenizers = {name: Tokenizer(model.info.get("tokenizer"), name) for name, model in models.items()}
    (first, one), *others = tokenizers.items()
    for name, other in others:
        if other.hash != one.hash:
            raise ValueError(f"{first} has {one.size} tokens ({one.hash[:8]}), {name} {other.size} "
                             f"({other.hash[:8]}): a reward needs a base with its own tokenizer")
    size = min(t.size for t in tokenizers.values())
    rows = {name: model.size for name, model in models.items()}
    if min(rows.values()) < size:
        raise ValueError(f"the tokenizer has {size} tokens, but the output matrices have rows: {rows}")
    if set(rows.values()) != {size}:
        print(f"the output matrices have {rows} rows: cut to the tokenizer's {size}")
        for model in models.values():
            model.size = size
    return one


def build(model_class, arch, tensors, info, dtype=torch.float32, *inputs):
    """The model, built on the meta device and given its tensors, strictly: no weight is in memory twice."""
    torch.tensor([arch.get("mean", CLIP_MEAN), arch.get("std", CLIP_STD)]).view(2, 3)  # raises unless threes
    layers = arch["layers"] if isinstance(arch["layers"], list) else [arch["layers"]]
    if max(layers) > len(tensors):  # else a damaged number builds modules for hours
        raise ValueError(f"{layers} layers in {len(tensors)} tensors")
    if model_class is GPT:  # its RoPE table is made at once
        heads, rows = arch["heads"] * arch["head_width"], len(tensors["layers.0.self_attn.q_proj.weight"])
        if heads != rows:
            raise ValueError(f"{arch['heads']} heads of {arch['head_width']}, but q_proj has {rows} rows")
    with torch.device("meta"):
        model = model_class(arch, *inputs)
    for name, x in tensors.items():
        tensors[name] = x.to(dtype) if x.is_floating_point() else x
    model.load_state_dict(tensors, assign=True)
    model.info = info
    return model.eval().requires_grad_(True)


ROLES = dict(base="a base", prt="a reward", ft="a fine-tuned model")
WORLDS = {True: "for text", False: "for images"}


def load(source, role=None, text=None, dtype=torch.float32):
    """A model in eval mode on the CPU, its plain values in model.info, from whatever `source` names:

    the project's own checkpoint; a folder, or hub id org/name, in OpenCLIP's layout (open_clip_config.json +
    open_clip_model.safetensors or open_clip_pytorch_model.bin) or Hugging Face's (config.json +
    model.safetensors, or its index and shards, + the tokenizer's files); a bare CLIP state dict (.pt,
    .safetensors); OpenAI's TorchScript .pt. role, text: what it must be, a key of ROLES and of WORLDS. dtype:
    a GPT's. Raises ValueError or OSError naming the file.
    """
    source, path, config = str(source), Path(source), {}
    if not path.exists() and (not HUB_ID.fullmatch(source) or path.suffix in (".pt", ".bin", ".safetensors")):
        raise FileNotFoundError(f"{source}: no such file or folder, and no hub id (org/name) either")

    def fetch(*names):
        """The path of the first of these files that the folder, the cache or else the hub has."""
        folder = path if path.exists() else CACHE / "hub" / source
        for name in names:
            if (folder / name).exists():
                return folder / name
        for name in names if folder != path else ():
            with contextlib.suppress(FileNotFoundError):
                return hub(source, name)
        raise FileNotFoundError(f"{source}: holds no {' and no '.join(names)}")

    file = path
    try:
        if not path.is_file():
            known = {True: ("config.json",), False: ("open_clip_config.json",)}
            file = fetch(*known.get(text, ("open_clip_config.json", "config.json")))
            config = json.loads(file.read_text())
        if file.name == "config.json":
            model = gpt_from(fetch, config, dtype)
        else:
            if config:
                file = fetch("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
            found = read(file)
            model = own(found, dtype) if "kind" in found else clip_from(found, config, file)
        found_role, found_text = model.info.get("method", "base"), model.info["kind"] == "gpt"
        what = f"{source} is {ROLES[found_role]} {WORLDS[found_text]}"
    except OSError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        why = " ".join(str(error).split()).removeprefix(f"{file}: ")[:400]
        raise ValueError(f"{file}: no model and no checkpoint of this project: {why}") from None
    wanted = role or found_role, found_text if text is None else text
    if wanted != (found_role, found_text):
        raise ValueError(f"{what}; {ROLES[wanted[0]]} {WORLDS[wanted[1]]} is needed here")
    return model


def clip_from(found, config, path):
    """The CLIP in a state dict, bare or under "state_dict" as OpenCLIP's training saves it."""
    tensors = {k.removeprefix("module."): v for k, v in found.get("state_dict", found).items()}
    arch = architecture(tensors, config)
    if not config and not arch["quick_gelu"]:
        print(f"{path}: a bare state dict does not tell activation and pixel mean: GELU, CLIP's mean taken")
    for name in ("input_resolution", "context_length", "vocab_size"):
        tensors.pop(name, None)
    return build(CLIP, arch, tensors, dict(kind="clip"))


def gpt_from(fetch, config, dtype):
    """The GPT in a folder of Hugging Face's layout; fetch: names -> path of the first that is there."""
    arch, tensors = gpt_architecture(config), {}
    file = fetch("model.safetensors", "model.safetensors.index.json")
    names = [file.name]
    if file.suffix == ".json":
        names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    for name in names:  # a shard is dropped once it is converted
        if Path(name).name != name:
            raise ValueError(f"{file.name} names {name}, no file beside it")
        tensors |= {k: x.to(dtype) for k, x in gpt_tensors(read(fetch(name)), arch).items()}
    return build(GPT, arch, tensors, dict(kind="gpt", tokenizer=tokenizer_text(fetch)), dtype)


def tokenizer_text(fetch):
    """The text of tokenizer.json, or one made of vocab.json and merges.txt (GPT-2's form); "" without any."""
    with contextlib.suppress(FileNotFoundError):
        return fetch("tokenizer.json").read_text("utf-8")
    with contextlib.suppress(FileNotFoundError):
        vocab, merges = (fetch(name).read_text("utf-8") for name in ("vocab.json", "merges.txt"))
        lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
        return json.dumps(dict(model=dict(vocab=json.loads(vocab), merges=lines),
                               pre_tokenizer=dict(type="ByteLevel")))
    return ""


def own(checkpoint, dtype):
    """The model in a checkpoint of `fit`: "clip" (both towers), "classifier" (image tower, head), "gpt"."""
    arch, tensors, kind = checkpoint["arch"], checkpoint["model"], checkpoint["kind"]
    info = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    if kind == "gpt":
        return build(GPT, arch, tensors, info, dtype)
    if kind == "clip":
        return build(CLIP, arch, tensors, info)
    return build(Classifier, arch, tensors, info, torch.float32, tensors["head"])
