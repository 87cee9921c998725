"""From files to models: public formats, and the checkpoints of this project."""
import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.parametrize import ParametrizationList

from data import files, images
from models import tickets
from models.clip import CLIP, Classifier, classifier, image_tower
from models.gpt import GPT
from models.tokenizer import Tokenizer

ROLES = dict(base="a base", prt="a reward", ft="a fine-tuned model")  # role or method -> name in messages
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def load(source, role=None, text=None, dtype=torch.float32, ref=None):
    """Returns a model in eval mode on the CPU; model.info holds its metadata, such as kind and method.

    source: a checkpoint of this project; a folder, or a Hub id org/name, in OpenCLIP's layout
        (open_clip_config.json + open_clip_model.safetensors or open_clip_pytorch_model.bin) or Hugging Face's
        (config.json + model.safetensors, or its index and shards, + the tokenizer's files); a bare CLIP state
        dict (.pt, .safetensors); OpenAI's TorchScript .pt.
    role: the role that it must have, a key of ROLES. text: True for a model for text, False for images.
    dtype: dtype of a GPT's weights.
    ref: the source base, for a ticket that is a mask over its weights (default: the path stored in it).

    Raises ValueError or OSError that names the file.
    """
    source, path, config = str(source), Path(source), {}
    is_hub_id = files.HUB_ID.fullmatch(source) and path.suffix not in (".pt", ".bin", ".safetensors")
    if not path.exists() and not is_hub_id:
        raise FileNotFoundError(f"{source}: no such file or folder, and not a Hub id (org/name) either")

    def fetch(*names):
        """Returns the path of the first of these files that the folder, the cache, or the Hub has."""
        folder = path if path.exists() else files.CACHE / "hub" / source
        for name in names:
            if (folder / name).exists():
                return folder / name
        for name in [] if path.exists() else names:  # only files of a Hub id can be downloaded
            with contextlib.suppress(FileNotFoundError):
                return files.hub(source, name)
        raise FileNotFoundError(f"{source}: holds no {' and no '.join(names)}")

    file = path
    try:
        if not path.is_file():
            layouts = {True: ["config.json"], False: ["open_clip_config.json"]}
            file = fetch(*layouts.get(text, ["open_clip_config.json", "config.json"]))
            config = json.loads(file.read_text())
        if file.name == "config.json":
            model = gpt_model(fetch, config, dtype)
        else:
            if config:
                file = fetch("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
            content = files.read(file)
            is_checkpoint = "kind" in content
            model = (checkpoint_model(content, dtype, ref) if is_checkpoint
                     else clip_model(content, config, file))
        is_role, is_text = model.info.get("method", "base"), model.info["kind"] == "gpt"
        description = describe(is_role, is_text)
    except files.DAMAGE as error:
        reason = " ".join(str(error).split()).removeprefix(f"{file}: ")[:400]
        raise ValueError(f"{file}: not a supported model or checkpoint: {reason}") from None
    needed = describe(role or is_role, is_text if text is None else text)
    if needed != description:
        raise ValueError(f"{source} is {description}; {needed} is needed here")
    return model


def describe(role, text):
    return f"{ROLES[role]} for {'text' if text else 'images'}"


def build(arch, tensors, info, dtype=torch.float32):
    """Returns the model with these tensors, whose names and shapes must match; converts the dict in place.

    info: its kind is "clip" (two towers), "classifier", or "gpt". The model is built on the meta device, so
    that no weight is in memory twice.
    """
    (check_gpt if info["kind"] == "gpt" else check_clip)(arch, tensors)
    with torch.device("meta"):
        model = network(info["kind"], arch, tensors.get("head"))
    for name, x in tensors.items():
        tensors[name] = x.to(dtype) if x.is_floating_point() else x
    model.load_state_dict(tensors, assign=True)
    model.info = info
    return model.eval().requires_grad_(True)


def network(kind, arch, head=None):
    """Returns a model with new random weights; head: that of a classifier."""
    if kind == "classifier":
        return Classifier(arch, image_tower(arch), head)
    return dict(clip=CLIP, gpt=GPT)[kind](arch)


def checkpoint_model(checkpoint, dtype, ref):
    """Returns the model in a checkpoint of this project; dtype: of a GPT. Image models are float32."""
    info = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    dtype = dtype if info["kind"] == "gpt" else torch.float32
    if "ticket" in info:
        return ticket_model(info, dtype, ref)
    return build(checkpoint["arch"], checkpoint["model"], info, dtype)


# Tickets

def ticket_model(info, dtype, ref):
    """Returns the network of a ticket; info: the checkpoint.

    Raises ValueError if the weights below its masks are not those of its training.
    """
    kind, arch, ticket = info["kind"], info["arch"], info["ticket"]
    layers = arch["layers"] if isinstance(arch["layers"], list) else [arch["layers"]]
    if max(layers) > 8 * len(ticket["masks"]):
        raise ValueError(f"{layers} layers, but masks of {len(ticket['masks'])} bytes")
    head = None if kind == "gpt" else torch.empty(len(info["classes"]), arch["embed_dim"])
    with torch.device("meta"):
        check_ticket(ticket, network(kind, arch, head))
    if ticket["kind"] == "random":
        model, cause = network(kind, arch, head), "another version of torch, or of this code, made the file"
    else:
        ref = ref or info["source"]
        model, cause = source_of(info, ref), f"{ref} is not the base that it was trained on; --ref names that"
    masked, checksum = tickets.masked_weights(model, ticket)
    if checksum != ticket["checksum"]:
        raise ValueError(f"its masks are for other weights than those it gets here: {cause}")
    tensors, sizes = model.state_dict(), [part.size for part in masked.values()]
    bits = np.unpackbits(ticket["masks"].numpy())[:sum(sizes)]
    for (name, part), mask in zip(masked.items(), torch.from_numpy(bits).float().split(sizes)):
        tensors[name] = part(mask)  # the highest "scores" of a mask are its ones
    return build(arch, tensors, info, dtype)


def source_of(info, ref):
    """Returns the source base, at ref, that a ticket masks, for images with its zero-shot head."""
    try:
        model = load(ref, "base", text=info["kind"] == "gpt")
    except OSError as error:
        raise OSError(f"{error}; a ticket is a mask over these weights: name them with --ref") from None
    if info["kind"] == "gpt":
        return model
    return classifier(model, images.prompts(info["classes"], info["templates"]))


def pack_masks(model, state):
    """Returns the masks of a ticket, sorted by name, as uint8 [bits / 8]; state: its state dict (scores)."""
    masks = {name.replace("parametrizations.", ""): tickets.TopK.apply(state[f"{name}.original"], module[0].k)
             for name, module in model.named_modules() if isinstance(module, ParametrizationList)}
    bits = torch.cat([mask for _, mask in sorted(masks.items())]).bool()
    return torch.from_numpy(np.packbits(bits.numpy()))


def check_ticket(ticket, model):
    """Raises ValueError unless a ticket's settings are valid and it has a bit for each searched weight.

    model: the network on the meta device, so that no damaged file allocates more than its masks account for.
    """
    kind, keep, freeze, masks = (ticket[k] for k in ("kind", "keep", "freeze", "masks"))
    if kind not in ("random", "base") or not (0 < keep < 1 and 0 <= freeze < 1):
        raise ValueError(f"a ticket of kind {kind!r:.50}, keep {keep!r:.50}, freeze {freeze!r:.50}: the "
                         "kinds are random and base, the others shares from 0 (keep: above 0) to below 1")
    sizes = [p.numel() for name, p in model.named_parameters() if tickets.is_masked(name, p)]
    bits = sum(tickets.counts(n, ticket)[1] for n in sizes)
    if masks.dtype != torch.uint8 or masks.shape != (math.ceil(bits / 8),):
        raise ValueError(f"masks of {masks.numel()} bytes for a network that needs {math.ceil(bits / 8)}")
    if (total := sum(p.numel() for p in model.parameters())) > 10_000 * bits:
        raise ValueError(f"{total} weights, of which only {bits} have a bit in the masks")


# CLIP

# Keys of open_clip_config.json that choose a variant -> the values that models/convnets.py supports.
CLIP_VARIANTS = dict(timm_pool=("avg",), timm_proj=("linear", "mlp"), timm_model_name=(
    "convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "convnext_xlarge"))


def clip_model(content, config, path):
    """Returns the CLIP in a state dict, bare or under "state_dict" as OpenCLIP's training saves it."""
    tensors = {k.removeprefix("module."): v for k, v in content.get("state_dict", content).items()}
    arch = clip_architecture(tensors, config)
    if not config and not arch["quick_gelu"]:
        size = f", {arch['image_size']} pixels" if "widths" in arch else ""  # of others, the shapes tell it
        print(f"{path}: a bare state dict without a configuration: taking GELU, CLIP's pixel mean{size}")
    for name in ("input_resolution", "context_length", "vocab_size"):
        tensors.pop(name, None)
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)  # FSDP shards no scalars
    return build(arch, tensors, dict(kind="clip"))


def check_sizes(arch, *keys):
    """Raises ValueError if one of these values in arch is not a positive integer."""
    for key in keys:
        if type(arch[key]) is not int or arch[key] < 1:  # a bool is an int, too
            name = GPT_KEYS[key].replace(" ", " or ") if "rope" in arch else key  # as in config.json
            raise ValueError(f"{name} is {arch[key]!r:.50}, not a positive integer")


def check_clip(arch, tensors):
    """Raises ValueError if arch has more layers than there are tensors, or wrong types or image sizes."""
    check_sizes(arch, "image_size", "text_layers", "text_heads", "context", "vocab")
    if "widths" not in arch:
        check_sizes(arch, "heads")
    elif not 32 <= arch["image_size"] <= 1024:  # no shape of a ConvNeXt's tensors depends on it
        raise ValueError(f"image_size is {arch['image_size']}; a ConvNeXt takes 32 to 1024 pixels here")
    torch.tensor([arch["mean"], arch["std"]]).view(2, 3)  # raises unless these are three numbers each
    layers = arch["layers"] if isinstance(arch["layers"], list) else [arch["layers"]]
    if max(*layers, arch["text_layers"]) > len(tensors):
        raise ValueError(f"{layers} layers in {len(tensors)} tensors")


def clip_architecture(tensors, config):
    """Returns the arch dict of models/clip.py, read off the shapes of a CLIP state dict.

    config: open_clip_config.json or {}. It adds what shapes do not tell: head widths, activation, mean, std,
        and a ConvNeXt's image size.
    """
    model, preprocess = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    known = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "image_size", "patch_size", "width",
             "layers", "heads", "head_width", "context_length", "vocab_size",
             "timm_drop", "timm_drop_path", "timm_model_pretrained")  # these three matter in pretraining only
    if unknown := [f"{k} {v!r:.50}" for part in (model, vision, text) for k, v in part.items()
                   if k not in known and v and v not in CLIP_VARIANTS.get(k, ())]:
        raise ValueError(f"open_clip_config.json sets {', '.join(unknown)}, which is not supported")

    def count(prefix):
        return len({name[len(prefix):].split(".")[0] for name in tensors if name.startswith(prefix)})

    def heads(width, number):
        if number < 1 or width % number or number % 1:
            raise ValueError(f"a width of {width} does not split into {number:g} heads")
        return int(number)

    def shape(name, n):
        if tensors[name].ndim != n:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}")
        return tensors[name].shape

    vocab, text_width = shape("token_embedding.weight", 2)
    openai = "input_resolution" in tensors  # a key of OpenAI's own files only
    arch = dict(embed_dim=shape("text_projection", 2)[1], quick_gelu=model.get("quick_gelu", openai),
                mean=preprocess.get("mean", CLIP_MEAN), std=preprocess.get("std", CLIP_STD),
                text_width=text_width, text_layers=count("transformer.resblocks."),
                text_heads=heads(text_width, text.get("heads", text_width / 64)),
                context=len(tensors["positional_embedding"]), vocab=vocab)
    if count("visual.trunk."):  # ConvNeXt, whose shapes do not tell the image size
        stages = [f"visual.trunk.stages.{i}.blocks." for i in range(4)]
        layers = [count(stage) for stage in stages]
        if layers == [3, 4, 30, 3]:
            raise ValueError("convnext_xxlarge is not supported: its LayerNorms have another epsilon")
        return arch | dict(widths=[shape(f"{stage}0.gamma", 1)[0] for stage in stages], layers=layers,
                           mlp_head="visual.head.mlp.fc1.weight" in tensors,
                           image_size=vision.get("image_size", 256))
    head_width = vision.get("head_width", 64)
    width, _, _, patch = shape("visual.conv1.weight", 4)
    if "visual.class_embedding" in tensors:
        grid = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
        return arch | dict(width=width, layers=count("visual.transformer.resblocks."), patch=patch,
                           heads=heads(width, width / head_width), image_size=grid * patch)
    tokens, features = tensors["visual.attnpool.positional_embedding"].shape
    return arch | dict(width=2 * width, layers=[count(f"visual.layer{i}.") for i in (1, 2, 3, 4)],
                       heads=heads(features, features / head_width), image_size=32 * math.isqrt(tokens - 1))


# GPTs

# Key of the arch dict -> the keys of config.json for the same value.
GPT_KEYS = dict(vocab="vocab_size", width="hidden_size n_embd", layers="num_hidden_layers n_layer",
                heads="num_attention_heads n_head", head_width="head_dim", kv_heads="num_key_value_heads",
                mlp="intermediate_size n_inner", positions="max_position_embeddings n_positions",
                eps="rms_norm_eps layer_norm_epsilon", tied="tie_word_embeddings", end="eos_token_id")
# Keys of config.json that choose a variant -> the values that models/gpt.py supports.
GPT_VARIANTS = dict(model_type=("gpt2", "llama", "qwen2"), hidden_act=("silu",), mlp_bias=(False,),
                    activation_function=("gelu_new",), attention_bias=(False,), use_sliding_window=(False,),
                    scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                    quantization_config=())
GPT2_NAMES = {"wte.": "embed_tokens.", "wpe.": "embed_positions.", "ln_f.": "norm.", "h.": "layers.",
              "ln_1.": "input_layernorm.", "ln_2.": "post_attention_layernorm.", "mlp.c_fc.": "mlp.up_proj.",
              "mlp.c_proj.": "mlp.down_proj.", "attn.c_proj.": "self_attn.o_proj."}


def gpt_model(fetch, config, dtype):
    """Returns the GPT in a folder of Hugging Face's layout; fetch: names -> path of the first that exists."""
    arch, tensors = gpt_architecture(config), {}
    file = fetch("model.safetensors", "model.safetensors.index.json")
    names = [file.name]
    if file.suffix == ".json":
        names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    for name in names:  # a shard is dropped once it is converted
        if Path(name).name != name:
            raise ValueError(f"{file.name} names {name}, which is not a file in its folder")
        tensors |= {k: x.to(dtype) for k, x in gpt_tensors(files.read(fetch(name)), arch).items()}
    return build(arch, tensors, dict(kind="gpt", tokenizer=tokenizer_text(fetch)), dtype)


def check_gpt(arch, tensors):
    """Raises ValueError if arch has values of the wrong type, or layers or heads that are not in tensors."""
    check_sizes(arch, "vocab", "width", "layers", "heads", "kv_heads", "head_width", "mlp", "positions")
    rope, vocab, end = arch["rope"] or dict(theta=1.0), arch["vocab"], arch["end"]  # GPT-2 has no RoPE
    scaling = [x for k, x in (rope.get("llama3") or {}).items() if "type" not in k]
    if not all(type(x) in (int, float) and 0 < x < math.inf for x in (arch["eps"], rope["theta"], *scaling)):
        raise ValueError(f"eps {arch['eps']!r:.50} or a number of RoPE is not above 0: {rope!r:.200}")
    if end is not None and not (type(end) is int and 0 <= end < vocab):
        raise ValueError(f"the end token is {end!r:.50}, but there are {vocab} tokens")
    if arch["layers"] > len(tensors):
        raise ValueError(f"{arch['layers']} layers in {len(tensors)} tensors")
    inner, rows = arch["heads"] * arch["head_width"], len(tensors["layers.0.self_attn.q_proj.weight"])
    if inner != rows:
        raise ValueError(f"{arch['heads']} heads of {arch['head_width']}, but q_proj has {rows} rows")


def gpt_architecture(config):
    """Returns the arch dict of models/gpt.py for a Hugging Face config.json."""
    if unknown := [k for k, known in GPT_VARIANTS.items() if k in config and config[k] not in known]:
        raise ValueError("models/gpt.py supports gpt2, llama (also Falcon3), and qwen2, but not "
                         + ", ".join(f"{k} {config[k]}" for k in unknown))
    arch = {ours: next((config[k] for k in theirs.split() if config.get(k) is not None), None)
            for ours, theirs in GPT_KEYS.items()}
    optional = ("end", "head_width", "kv_heads", "mlp", "tied")
    missing = [GPT_KEYS[k] for k, v in arch.items() if v is None and k not in optional]
    if missing or "model_type" not in config:
        raise ValueError(f"it lacks {', '.join(missing) or 'model_type'}")
    family, end = config["model_type"], arch["end"]
    gpt2 = family == "gpt2"
    defaults = dict(kv_heads=arch["heads"], head_width=arch["width"] // arch["heads"], mlp=4 * arch["width"],
                    tied=gpt2)
    arch |= {k: v for k, v in defaults.items() if arch[k] is None}
    return arch | dict(rope=None if gpt2 else rope_parameters(config), layer_norm=gpt2, gated_mlp=not gpt2,
                       qkv_bias=family != "llama", bias=gpt2, end=end[0] if isinstance(end, list) else end)


def rope_parameters(config):
    """Returns `rope` of the arch dict, from rope_parameters or, in older config.json files, rope_theta."""
    old = dict(rope_theta=config.get("rope_theta", 10000.0)) | (config.get("rope_scaling") or {})
    parameters = config.get("rope_parameters") or old
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind} is not supported, only default and llama3")
    return dict(theta=parameters["rope_theta"], llama3=parameters if kind == "llama3" else None)


def gpt_tensors(tensors, arch):
    """Returns a Hugging Face GPT's tensors with the names and shapes of models/gpt.py."""
    renamed = {}
    for name, x in tensors.items():
        name = name.removeprefix("transformer.").removeprefix("model.")
        is_tied = name == "lm_head.weight" and arch["tied"]
        if is_tied or name.endswith((".attn.bias", ".attn.masked_bias", ".inv_freq")):  # copy, old buffers
            continue
        if arch["rope"] is None:  # GPT-2
            x = x.T.contiguous() if ".c_" in name and x.ndim == 2 else x  # stored as [inputs, outputs]
            for old, new in GPT2_NAMES.items():
                name = name.replace(old, new)
        if ".attn.c_attn." in name:  # one matrix for the three projections
            for letter, part in zip("qkv", x.chunk(3)):
                renamed[name.replace("attn.c_attn", f"self_attn.{letter}_proj")] = part
        else:
            renamed[name] = x
    return renamed


def tokenizer_text(fetch):
    """Returns the text of tokenizer.json, or one made of GPT-2's vocab.json and merges.txt, or ""."""
    with contextlib.suppress(FileNotFoundError):
        return fetch("tokenizer.json").read_text("utf-8")
    with contextlib.suppress(FileNotFoundError):
        vocab, merges = (fetch(name).read_text("utf-8") for name in ("vocab.json", "merges.txt"))
        lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
        return json.dumps(dict(model=dict(vocab=json.loads(vocab), merges=lines),
                               pre_tokenizer=dict(type="ByteLevel")))
    return ""


def same_vocabulary(models):
    """Returns the tokenizer that GPTs share, and limits their logits to its number of tokens.

    models: name -> GPT. Raises ValueError if the tokenizers differ, or an output matrix has too few rows. A
    ticket has only the hash of its tokenizer, which would be larger than its masks.
    """
    tokenizers = {name: Tokenizer(model.info.get("tokenizer"), name) for name, model in models.items()
                  if "ticket" not in model.info}
    first_name, first = next(iter(tokenizers.items()))
    for name, model in models.items():
        other_size, other_hash = "others", model.info["tokenizer"]
        if name in tokenizers:
            other_size, other_hash = tokenizers[name].size, tokenizers[name].hash
        if other_hash != first.hash:
            raise ValueError(f"{first_name} has {first.size} tokens ({first.hash[:8]}), {name} {other_size} "
                             f"({other_hash!s:.8}): a reward and its base must have the same tokenizer")
    size = min(tokenizer.size for tokenizer in tokenizers.values())
    rows = {name: model.size for name, model in models.items()}
    if min(rows.values()) < size:
        raise ValueError(f"the tokenizer has {size} tokens, more than an output matrix has rows: {rows}")
    if set(rows.values()) != {size}:
        print(f"output matrices with {rows} rows are cut to the tokenizer's {size}")
        for model in models.values():
            model.size = size
    return first
