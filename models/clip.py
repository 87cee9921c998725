"""CLIP (Radford et al. 2021), its parameters named as in OpenAI's and OpenCLIP's checkpoints.

An architecture is a dict of plain values, which models/weights.py reads off a state dict: embed_dim,
image_size, mean, std, quick_gelu, for the text tower text_width, text_layers, text_heads, context, vocab,
for a ViT width, layers (an int), patch, heads, for a ModifiedResNet width, layers (four ints), heads.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class QuickGELU(nn.Module):
    """OpenAI's GELU; weights trained with it lose points, in silence, under the exact one."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal, n):
        B, T, D = x.shape
        if n == T:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            q = F.linear(x[:, :n], self.in_proj_weight[:D], self.in_proj_bias[:D])
            k, v = F.linear(x, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, T, D/H]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # [B, n, D]


class Block(nn.Module):
    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        act = QuickGELU() if quick_gelu else nn.GELU()
        parts = dict(c_fc=nn.Linear(width, 4 * width), gelu=act, c_proj=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, causal=False, n=None):
        """x [B, T, D] -> the first n positions of the block's output, [B, n, D] (all of them by default)."""
        n = n or x.shape[1]
        x = x[:, :n] + self.attn(self.ln_1(x), causal, n)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, quick_gelu):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, quick_gelu) for _ in range(layers))


class VisionTransformer(nn.Module):
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
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [B, 3, S, S] -> [B, T, D]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))  # [B, 1 + T, D]
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x)
        x = last(x, n=1)  # only the class token is read, so the last block computes no other: 7% of a ViT-B
        return self.ln_post(x[:, 0]) @ self.proj  # [B, E]


class Bottleneck(nn.Module):
    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()  # strides are pools: every pixel counts
        self.pool = pool
        self.downsample = None
        if stride > 1 or inputs != 4 * planes:
            conv = nn.Conv2d(inputs, 4 * planes, 1, bias=False)
            parts = {"-1": pool, "0": conv, "1": nn.BatchNorm2d(4 * planes)}
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        return F.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


class AttentionPool(nn.Module):
    def __init__(self, tokens, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(tokens + 1, width) * width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # [B, D, h, w] -> [B, T, D]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))  # the mean token asks
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))  # [B, E]


class ModifiedResNet(nn.Module):
    """RN50, RN101: a three-convolution stem, anti-aliased strides, attention in place of the last pool."""

    def __init__(self, arch):
        super().__init__()
        width, inputs = arch["width"], arch["width"]
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        for i, blocks in enumerate(arch["layers"]):
            planes, layer = width * 2**i, nn.Sequential()
            for j in range(blocks):
                layer.append(Bottleneck(inputs, planes, stride=2 if i and not j else 1))
                inputs = 4 * planes
            self.add_module(f"layer{i + 1}", layer)
        tokens = (arch["image_size"] // 32) ** 2
        self.attnpool = AttentionPool(tokens, inputs, arch["heads"], arch["embed_dim"])

    def forward(self, x):
        for i in "123":
            x = F.relu(getattr(self, "bn" + i)(getattr(self, "conv" + i)(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))
        return self.attnpool(x)


def image_tower(arch):
    return ModifiedResNet(arch) if isinstance(arch["layers"], list) else VisionTransformer(arch)


def normalize(images, arch):
    """uint8 [B, 3, S, S] -> float32, by the weights' own mean and std. Floats pass: they are normalised."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (torch.tensor(arch[k]).to(images.device, non_blocking=True) for k in ("mean", "std"))
    return (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def cosine(features, head):
    """Logits [B, L] of features [B, E] for a head [L, E] that is normalised and scaled already.

    Outside autocast: times a scale of 100, bfloat16 would round the logits to steps of a quarter.
    """
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1) @ head.T


class CLIP(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.arch, width = arch, arch["text_width"]
        self.visual = image_tower(arch)
        self.token_embedding = nn.Embedding(arch["vocab"], width)
        self.positional_embedding = nn.Parameter(torch.randn(arch["context"], width) * 0.01)
        self.transformer = Transformer(width, arch["text_layers"], arch["text_heads"], arch["quick_gelu"])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, arch["embed_dim"]) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """Normalised float images [B, 3, S, S] -> features [B, E], before their L2 normalisation."""
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids [B, T], T at most the context -> features [B, E], not normalised.

        The end-of-text id is the vocabulary's largest; the feature is read there, so padding behind it is
        never seen.
        """
        x = self.token_embedding(tokens)
        x = x + self.positional_embedding[: tokens.shape[1]].to(x.dtype)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]  # [B, T, D] -> [B, D]
        return self.ln_final(x) @ self.text_projection

    def forward(self, images, tokens):
        """Images [B, 3, S, S] and their captions [B, T] -> logits [2B, B]: images over texts, texts over
        images.

        Their cross-entropy with the targets 0..B-1, twice, is CLIP's contrastive loss.
        """
        text = F.normalize(self.encode_text(tokens).float(), dim=-1) * self.logit_scale.exp().clamp(max=100)
        logits = cosine(self.encode_image(normalize(images, self.arch)), text)
        return torch.cat([logits, logits.T])


class Classifier(nn.Module):
    """Image tower and fixed head [L, E]: images [B, 3, S, S], uint8 or normalised floats -> logits [B, L]."""

    def __init__(self, arch, head):
        super().__init__()
        self.arch = arch
        self.visual = image_tower(arch)
        self.register_buffer("head", head)

    def forward(self, images):
        return cosine(self.visual(normalize(images, self.arch)), self.head)


@torch.no_grad()
def classifier(clip, prompts):
    """The zero-shot classifier of a CLIP and its tokenised class prompts [L, P, T] (P templates a class).

    Head: text features, normalised, averaged over the templates, normalised, times exp(logit_scale). The
    image tower is shared with the CLIP, not copied. Raises ValueError where the CLIP cannot hold the
    prompts.
    """
    have, need = (clip.arch["vocab"], clip.arch["context"]), (int(prompts.max()) + 1, prompts.shape[-1])
    if need > have or need[1] > have[1]:
        raise ValueError(f"the prompts need (vocabulary, positions) {need}, this CLIP has {have}")
    device = clip.logit_scale.device
    texts = (F.normalize(clip.encode_text(p.to(device)), dim=-1) for p in prompts)  # each [P, E]
    head = torch.stack([text.mean(0) for text in texts])  # [L, E]
    head = F.normalize(head, dim=-1) * clip.logit_scale.exp()
    with torch.device("meta"):
        model = Classifier(clip.arch, head)
    model.visual, model.head = clip.visual, head
    return model.eval()
