"""From files to models, and from a run to its checkpoint: `load`, `save`, and what --resume needs.

models/clip.py and models/gpt.py read public files. A checkpoint of this project is a dict that torch.save
wrote; models/README.md lists its entries.
"""
import contextlib
import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from tqdm import tqdm

from data import files, hub, schema
from models import flags

ROLES = dict(base="a base", prt="a reward", ft="a fine-tuned model")  # role or method -> name in messages
# Saved as one process would save it, without weights that are not trained.
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
# The file that tells a folder's layout -> whether it is that of a model for text.
LAYOUTS = {"open_clip_config.json": False, "config.json": True}
# Flags that may change when a run is resumed.
MAY_CHANGE = {"resume", "device", "compile", "out", "chunk", "recompute"}


# Load

def load(name, role=None, text=None, dtype=torch.float32, source=None):
    """Returns a model in eval mode on the CPU; model.info holds its metadata, such as kind and method.

    name: a checkpoint of this project; a folder, or a Hub id org/name, in OpenCLIP's layout
        (open_clip_config.json + open_clip_model.safetensors or open_clip_pytorch_model.bin) or Hugging Face's
        (config.json + model.safetensors, or its index and shards, + the tokenizer's files); or a bare CLIP
        state dict (.pt, .bin, .safetensors); or a network of your own, file.py:function (models/own.py).
    role: the role that it must have, a key of ROLES. text: True for a model for text, False for images.
    dtype: of a GPT's weights; those of image models are then float32. None: as in the file, which is mapped
        into memory, so that runs.place need not hold the model twice.
    source: the source, for a reward whose file holds only masks or factors of its weights (default: the
        path stored in it).

    Raises ValueError or OSError that names the file.
    """
    name, path = str(name), Path(name)
    if name.endswith(".py"):
        raise ValueError(f"{name}: name a function in it, such as {name}:old")
    if hub.OWN.fullmatch(name):
        if text or role not in (None, "base"):
            raise ValueError(f"{name}: a network of your own can only be a base for images")
        from models import own  # an optional file
        return own.load(name)
    try:
        if path.exists() and not path.is_dir():
            model = from_file(path, role, dtype, source)
        else:
            model = from_folder(name, text, dtype)
        found, is_text = ROLES[model.info.get("method", "base")], model.info["kind"] == "gpt"
    except files.DAMAGE as error:
        reason = " ".join(str(error).split()).removeprefix(f"{name}: ")[:400]
        raise ValueError(f"{name}: not a supported model or checkpoint: {reason}") from None
    needed, text = ROLES[role] if role else found, is_text if text is None else text
    if (found, is_text) != (needed, text):
        kinds = {True: "text", False: "images"}
        raise ValueError(f"{name} is {found} for {kinds[is_text]}; {needed} for {kinds[text]} is needed here")
    return model


def from_folder(name, text, dtype):
    """Returns the model in a folder or of a Hub id; arguments as in `load`."""
    config = hub.find(name, *(k for k, v in LAYOUTS.items() if text in (None, v)))
    if config.name == "config.json":
        from models import gpt
        info = dict(kind="gpt", tokenizer=gpt.tokenizer_text(name))
        model = build(info, *gpt.read_folder(name, dtype), dtype)
    else:
        from models import clip
        model = build(dict(kind="clip"), *clip.read_folder(name), dtype)
    if entries := files.read_json(config).get("prt"):
        from models import export  # an optional file
        model = export.restored(model, entries)
    return model


def from_file(path, role, dtype, source):
    """Returns the model in a checkpoint of this project or a bare CLIP state dict; arguments as in `load`."""
    content = files.read(path)
    if "kind" not in content:
        from models import clip
        return build(dict(kind="clip"), *clip.from_state_dict(path, content), dtype)
    check_checkpoint(content)
    if "optimizer" in content:
        raise ValueError(f"an unfinished run, of {content['step']} steps so far: continue it with --resume")
    if "ticket" in content or "lora" in content:
        if role == "base":
            raise ValueError("a reward in a small file, which is no base")
        if "ticket" in content:
            from models import ticket_files as room  # an optional file
        else:
            from models import lora as room
        try:
            return room.load(content, dtype, source)
        except OSError as error:
            raise OSError(f"{error}; the file changes these weights: name them with --source") from None
    if not all(x.isfinite().all() for x in content["model"].values()):
        raise ValueError("a weight is nan or infinite")
    info = {k: v for k, v in content.items() if k != "model"}
    if "net" in content["arch"] and role == "base":
        raise ValueError("a model tuned from a network of your own, which is no base; a function can load it")
    if "net" in content["arch"] and Path(source or "").name == Path(content["arch"]["net"]).name:
        info["arch"] = content["arch"] = content["arch"] | dict(net=source)  # where the file is now
    return build(info, content["arch"], content["model"], dtype)


def check_checkpoint(content):
    """Raises ValueError unless a checkpoint is as models/README.md lists its entries.

    This is done once, right after a file was read. All other code trusts the checkpoint.
    """
    kind, parts = content["kind"], ["checkpoint"]
    if schema.fits(kind, schema.SCHEMAS["checkpoint"]["kind"]):  # else, this is what the check below refuses
        parts.append(f"{kind}_checkpoint")
    if "method" in content or kind == "classifier":
        parts.append("tuned")
    parts += [kind for kind in ("ticket", "lora") if kind in content]
    if "optimizer" in content:
        parts.append("unfinished")
    schema.check(content, "its entries", *parts)
    network_module(content).check_arch(content["arch"])


def load_base(name, info, dtype=torch.float32, device=None):
    """Returns a base for a reward, of which `info` is the metadata; for images, as a zero-shot classifier.

    device: where the text tower of that runs.
    """
    model = load(name, "base", info["kind"] == "gpt", dtype)
    if info["kind"] == "gpt":
        return model
    return as_classifier(model, info["classes"], info["templates"], device)


def as_classifier(model, classes, templates, device=None):
    """Returns the zero-shot classifier of a CLIP, or a network of your own as it is, if it has these classes.

    device: where a CLIP's text tower runs.
    """
    if model.info["kind"] != "clip":
        from models import own  # an optional file
        return own.checked(model, classes)
    from data import images
    from models.clip import classifier
    return classifier(model, images.prompts(classes, templates), device)


def build(info, arch, tensors, dtype=torch.float32):
    """Returns the model with these tensors, whose names and shapes must match; converts the dict in place.

    info: its kind is "clip" (two towers), "classifier", or "gpt". dtype: as in `load`. The model is built on
    the meta device, so that no weight is in memory twice.
    """
    if "net" in arch:
        from models import own  # an optional file
        return own.restored(info, arch, tensors)
    with torch.device("meta"):
        model = network_module(info).network(info, arch, tensors.get("head"))
    dtype = torch.float32 if dtype and info["kind"] != "gpt" else dtype
    buffers = dict(model.named_buffers())
    for name in [*tensors]:
        x = tensors.pop(name)
        name = name.replace(".in_proj_", ".in_proj.")  # the names in CLIP's files
        if x.is_floating_point():
            x = x.to(torch.float32 if name in buffers else dtype or x.dtype)
        elif not name.endswith("num_batches_tracked"):  # of BatchNorm
            raise ValueError(f"{name} has dtype {x.dtype}; weights are floating-point numbers")
        tensors[name] = x
    model.load_state_dict(tensors, assign=True)
    model.info = info
    return model.eval().requires_grad_(True)


def network_module(info):
    """Returns the module that has the network of this kind, and its functions `check` and `network`."""
    if info["kind"] == "gpt":
        from models import gpt
        return gpt
    from models import clip
    return clip


# Train

@contextlib.contextmanager
def run(args, made=()):
    """Keeps other runs from args.out; its value is the checkpoint to continue from, or None without --resume.

    Raises before any work is done if the run cannot go through (flags.check_run, which has `made`), or if the
    file cannot be written, exists, or belongs to a run that is going on or had other settings.
    """
    from models import watch  # which needs this file
    flags.check_run(args, made)
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = path.with_name(f"{path.name}.lock")  # as long a name as that of the file that `save` writes first
    with contextlib.ExitStack() as stack:
        if not dist.is_initialized() or dist.get_rank() == 0:
            stack.enter_context(files.lock(mark, wait=False))
            stack.callback(mark.unlink, missing_ok=True)
        if args.resume:
            from models import resume
            yield resume.checkpoint(path, settings(args))
        elif path.exists():
            raise FileExistsError(f"{path} exists: continue it with --resume, or choose another --out")
        else:
            watch.check(args)
            yield None


def settings(args):
    """Returns the arguments that must be the same when a run is resumed; its checkpoint stores them.

    --accum may change with the number of processes, except in pretraining, where CLIP's loss depends on the
    size of the micro-batch.
    """
    free = MAY_CHANGE if args.method == "pretrain" else MAY_CHANGE | {"accum"}
    return {k: v for k, v in vars(args).items() if k not in free}


def check_same(args, state, info):
    """Raises ValueError if the run in `state`, if any, had other data or another source than info says."""
    for key, value in info.items() if state else ():
        if state.get(key) != value:
            raise ValueError(f"--resume: {args.out} had other {key}: its data or its source changed")


def fingerprint(model):
    """Returns a sha256 of a sample of a model's weights, the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        sample = x.flatten()[::max(1, x.numel() // 1000)].to("cpu", torch.bfloat16).contiguous()
        if name != "head":  # of a zero-shot classifier, computed from the text tower
            digest.update(sample.view(torch.int16).numpy())
    return digest.hexdigest()


def restore(args, model, optimizer, state, steps):
    """Puts the weights and optimizer state of `state`, if any, in place; returns its number of steps."""
    if state is None:
        return 0
    from models import resume
    return resume.restore(args.out, model, optimizer, state, steps)


def save(args, info, model, optimizer, step, steps):
    """Writes a checkpoint to args.out, with the optimizer's state unless it is the last of the run.

    info: its entries besides weights. The last one of a ticket holds its masks instead of weights.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FULL_STATE)
    content = info | dict(args=settings(args), step=step)
    if not dist.is_initialized() or dist.get_rank() == 0:
        if step < steps:
            files.save(args.out, content | dict(model=model_state, optimizer=optimizer_state))
        elif "ticket" in info:
            from models import ticket_files
            ticket_files.save(args.out, content, model, model_state)
        else:
            if "lora" in info:
                from models import lora
                model_state = lora.packed(model_state)
            files.save(args.out, content | dict(model=model_state))
        if step == steps:
            tqdm.write(f"{args.out}: {Path(args.out).stat().st_size:,} bytes")
    if dist.is_initialized():
        dist.barrier()  # no process continues before the file exists
