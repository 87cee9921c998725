"""CLIP (Radford et al. 2021) with a ViT, and how it is read from OpenCLIP's and OpenAI's files.

Parameters have the names of these files, but for `in_proj.` instead of `in_proj_`. An architecture is a dict
of plain values, which `architecture` reads off a state dict: embed_dim, image_size, mean, std, quick_gelu;
the text tower's text_width, text_layers, text_heads, context, vocab; and a ViT's width, layers (an int),
patch, heads. models/convnets.py has the convolutional image towers, whose `layers` are four ints.
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from data import files, hub, schema


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU; weights trained with it are less accurate with nn.GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width, device="meta")  # of the files' in_proj_weight and _bias
        self.in_proj.weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj.bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal, queries):
        """Maps features x [B, T, D] to [B, queries, D]; only the first `queries` positions are queries."""
        q, k, v = self.in_proj(x).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, T, D/H]
        x = F.scaled_dot_product_attention(q[:, :, :queries], k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # [B, H, queries, D/H] -> [B, queries, D]


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to its input."""

    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        parts = dict(c_fc=nn.Linear(width, 4 * width), gelu=gelu, c_proj=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, causal=False, queries=None):
        """Maps features x [B, T, D] to the output at the first `queries` positions, all T by default."""
        queries = queries or x.shape[1]
        x = x[:, :queries] + self.attn(self.ln_1(x), causal, queries)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, quick_gelu):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, quick_gelu) for _ in range(layers))


class VisionTransformer(nn.Module):
    """ViT: a patch embedding, a class token, and a Transformer."""

    def __init__(self, arch):
        super().__init__()
        width, patch = arch["width"], arch["patch"]
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        tokens = (arch["image_size"] // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, arch["layers"], arch["heads"], arch["quick_gelu"])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, arch["embed_dim"]))

    def forward(self, x):
        """Maps normalized images [B, 3, S, S] to features [B, E], E = embed_dim."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [B, 3, S, S] -> [B, T, D]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)  # [B, 1 + T, D]
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        *blocks, last_block = self.transformer.resblocks
        for block in blocks:
            x = block(x)
        x = last_block(x, queries=1)  # only the class token is read: 7% faster for a ViT-B-16
        return self.ln_post(x[:, 0]) @ self.proj  # [B, D] -> [B, E]


def image_tower(arch):
    """Returns the image tower of an architecture, with random weights."""
    if isinstance(arch["layers"], int):
        return VisionTransformer(arch)
    from models import convnets  # an optional file
    return convnets.image_tower(arch)


def resize(images, size):
    """Returns uint8 images [B, 3, h, w] as uint8 [B, 3, size, size], nearly as PIL's bicubic resize."""
    if images.shape[-2:] == (size, size):
        return images
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)


class Preprocess(nn.Module):
    """Maps uint8 images [B, 3, h, w] to float32 [B, 3, S, S], resized and normalized; others unchanged."""

    def __init__(self, arch):
        super().__init__()
        self.size = arch["image_size"]
        for name in ("mean", "std"):  # on the CPU, even if models/weights.py builds the model on "meta"
            x = torch.tensor(arch[name], device="cpu").view(3, 1, 1)
            self.register_buffer(name, x, persistent=False)

    def forward(self, images):
        if images.dtype != torch.uint8:
            return images
        return (resize(images, self.size) / 255 - self.mean) / self.std


def cosine(features, head):
    """Normalizes features [B, E] and returns their logits [B, L] for a normalized and scaled head [L, E].

    Autocast is off here: with a scale of 100, bfloat16 would round the logits to multiples of 0.25 or 0.5.
    """
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1) @ head.T


class CLIP(nn.Module):
    """An image tower and a text tower with a common space of features."""

    def __init__(self, arch):
        super().__init__()
        self.arch, width = arch, arch["text_width"]
        self.preprocess, self.visual = Preprocess(arch), image_tower(arch)
        self.token_embedding = nn.Embedding(arch["vocab"], width)
        self.positional_embedding = nn.Parameter(torch.randn(arch["context"], width) * 0.01)
        self.transformer = Transformer(width, arch["text_layers"], arch["text_heads"], arch["quick_gelu"])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, arch["embed_dim"]) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, tokens):
        """Maps token ids [B, T], T <= context, to features [B, E], before their L2 normalization.

        The feature is read at the end token, which has the largest id. Attention is causal, so that padding
        after it has no effect.
        """
        x = self.token_embedding(tokens)  # [B, T, D]
        x = x + self.positional_embedding[: tokens.shape[1]].to(x.dtype)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]  # [B, T, D] -> [B, D]
        return self.ln_final(x) @ self.text_projection

    def forward(self, images, tokens):
        """Maps images [B, 3, h, w], as for Preprocess, and their captions [B, T] to logits [2B, B].

        Row i < B scores all texts for image i, and row B + i scores all images for text i. Cross-entropy with
        the targets 0 to B-1, repeated for both halves, is CLIP's contrastive loss.
        """
        text = F.normalize(self.encode_text(tokens).float(), dim=-1) * self.logit_scale.exp().clamp(max=100)
        logits = cosine(self.visual(self.preprocess(images)), text)
        return torch.cat([logits, logits.T])


class Classifier(nn.Module):
    """An image tower and a fixed head [L, E]: images [B, 3, h, w], as for Preprocess -> logits [B, L]."""

    def __init__(self, arch, visual, head):
        super().__init__()
        self.arch, self.preprocess, self.visual = arch, Preprocess(arch), visual
        self.register_buffer("head", head)

    def forward(self, images):
        return cosine(self.visual(self.preprocess(images)), self.head)


@torch.no_grad()
def classifier(clip, prompts, device=None):
    """Returns the zero-shot classifier of a CLIP for the token ids [L, P, T] of P prompts per class.

    Its head: text features, normalized, averaged over the prompts, normalized, times exp(logit_scale). The
    image tower is shared, neither copied nor moved. device: where the rest of the CLIP is moved to, in
    float32, and runs (default: where it is). Raises ValueError if the prompts exceed the vocabulary or the
    context.
    """
    have, need = (clip.arch["vocab"], clip.arch["context"]), (int(prompts.max()) + 1, prompts.shape[-1])
    if need[0] > have[0] or need[1] > have[1]:
        raise ValueError(f"the prompts need (vocabulary, positions) {need}, but this CLIP has {have}")
    device = device or clip.logit_scale.device
    for name, p in clip.named_parameters():
        if not name.startswith("visual."):
            p.data = p.data.to(device, torch.float32)
    texts = (F.normalize(clip.encode_text(p.to(device)), dim=-1) for p in prompts)  # each [P, E]
    head = torch.stack([text.mean(0) for text in texts])  # [L, E]
    head = F.normalize(head, dim=-1) * clip.logit_scale.exp()
    return Classifier(clip.arch, clip.visual, head).eval()


def network(info, arch, head=None):
    """Returns a CLIP or, for the kind "classifier", an image tower with a head [L, E]; random weights."""
    if info["kind"] == "clip":
        return CLIP(arch)
    if head.shape != (classes := len(info.get("classes", head)), arch["embed_dim"]):
        raise ValueError(f"its head has shape {list(head.shape)}, for {classes} classes")
    return Classifier(arch, image_tower(arch), head)


def check_arch(arch):
    """Raises ValueError unless an architecture in a checkpoint has the keys and values named above."""
    if "net" in arch:
        return schema.check(arch, "arch", dict(net="a text", image_size="a positive integer"))
    tower = "convnext" if "widths" in arch else "resnet" if isinstance(arch.get("layers"), list) else "vit"
    schema.check(arch, "arch", "clip", tower)
    heads(arch["text_width"], arch["text_heads"])
    if tower == "vit" and heads(arch["width"], arch["heads"]) and arch["image_size"] % arch["patch"]:
        raise ValueError(f"{arch['image_size']} pixels do not split into patches of {arch['patch']}")


# Public files

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of OpenAI's pixels

def read_folder(name):
    """Returns the architecture and tensors of a CLIP in OpenCLIP's layout; name: a folder or Hub id."""
    config = files.read_json(hub.find(name, "open_clip_config.json"))
    file = hub.find(name, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return from_state_dict(file, files.read(file), config)


def from_state_dict(name, content, config=None):
    """Returns the architecture and tensors of a state dict, bare or as OpenCLIP's training saves it.

    config: that of open_clip_config.json. Without it, a printed line that begins with name says what was
    assumed.
    """
    tensors = {k.removeprefix("module."): v for k, v in content.get("state_dict", content).items()}
    arch = architecture(tensors, config or {})
    if config is None and not arch["quick_gelu"]:
        size = f", {arch['image_size']} pixels" if "widths" in arch else ""  # of others, the shapes tell it
        print(f"{name}: a bare state dict without a configuration: taking GELU, CLIP's pixel mean{size}")
    for key in ("input_resolution", "context_length", "vocab_size"):
        tensors.pop(key, None)
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)  # FSDP shards no scalars
    return arch, tensors


def architecture(tensors, config):
    """Returns the architecture, read off the shapes of a CLIP's tensors.

    config: that of open_clip_config.json, or {}. It adds what shapes do not tell: head widths, activation,
    mean, std, and a ConvNeXt's image size.
    """
    name = "open_clip_config.json"
    if config:
        schema.check(config, name, "open_clip_config")
    model, preprocess = config.get("model_cfg", {}), config.get("preprocess_cfg") or {}
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    if config:
        schema.check(vision, name, "vision_cfg_timm" if "timm_model_name" in vision else "vision_cfg")
        schema.check(text, name, "text_cfg")
        schema.check(preprocess, name, "preprocess_cfg")
    vocab, text_width = shape(tensors, "token_embedding.weight", 2)
    openai = "input_resolution" in tensors  # a key of OpenAI's own files only
    arch = dict(embed_dim=shape(tensors, "text_projection", 2)[1], quick_gelu=model.get("quick_gelu", openai),
                mean=preprocess.get("mean") or MEAN, std=preprocess.get("std") or STD,
                text_width=text_width, text_layers=count(tensors, "transformer.resblocks."),
                text_heads=heads(text_width, text.get("heads") or (8 if config else text_width / 64)),
                context=len(tensors["positional_embedding"]), vocab=vocab)
    if "visual.class_embedding" not in tensors:
        from models import convnets  # an optional file
        arch |= convnets.architecture(tensors, vision)
    else:
        width, _, _, patch = shape(tensors, "visual.conv1.weight", 4)
        grid = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
        arch |= dict(width=width, layers=count(tensors, "visual.transformer.resblocks."), patch=patch,
                     heads=heads(width, width / (vision.get("head_width") or 64)), image_size=grid * patch)
    stated = dict(embed_dim=model.get("embed_dim"), layers=vision.get("layers"), width=vision.get("width"),
                  patch=vision.get("patch_size"), image_size=vision.get("image_size"),
                  context=text.get("context_length"), vocab=text.get("vocab_size"),
                  text_width=text.get("width"), text_layers=text.get("layers"))
    if wrong := [f"{k} {x}" for k, x in stated.items() if x is not None and arch.get(k, x) != x]:
        raise ValueError(f"{name} states {', '.join(wrong)}; the shapes of the weights tell otherwise")
    return arch


def count(tensors, prefix):
    """Returns how many numbered parts the names with this prefix have."""
    return len({name[len(prefix):].split(".")[0] for name in tensors if name.startswith(prefix)})


def heads(width, number):
    if number < 1 or width % number or number % 1:
        raise ValueError(f"a width of {width} does not split into {number:g} heads")
    return int(number)


def shape(tensors, name, dimensions):
    if tensors[name].ndim != dimensions:
        raise ValueError(f"{name} has shape {list(tensors[name].shape)}")
    return tensors[name].shape
