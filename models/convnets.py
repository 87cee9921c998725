"""CLIP's convolutional image towers, with parameters named as in OpenAI's and OpenCLIP's checkpoints.

Beside the keys of models/clip.py, an architecture has a ModifiedResNet's width, layers (four ints), heads; or
a ConvNeXt's widths, layers (four ints each), mlp_head (whether its head is an MLP).
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from models.clip import count, heads, shape


def image_tower(arch):
    return ConvNeXt(arch) if "widths" in arch else ModifiedResNet(arch)


def architecture(tensors, vision):
    """Returns the image tower's part of an architecture, read off the shapes of a CLIP's tensors.

    vision: vision_cfg of open_clip_config.json, or {}.
    """
    if count(tensors, "visual.trunk."):  # ConvNeXt, whose shapes do not tell the image size
        stages = [f"visual.trunk.stages.{i}.blocks." for i in range(4)]
        layers = [count(tensors, stage) for stage in stages]
        if layers == [3, 4, 30, 3]:
            raise ValueError("convnext_xxlarge is not supported: its LayerNorms have another epsilon")
        widths = [shape(tensors, f"{stage}0.gamma", 1)[0] for stage in stages]
        return dict(widths=widths, layers=layers, mlp_head="visual.head.mlp.fc1.weight" in tensors,
                    image_size=vision.get("image_size", 256))
    width = shape(tensors, "visual.conv1.weight", 4)[0]
    tokens, features = tensors["visual.attnpool.positional_embedding"].shape
    return dict(width=2 * width, layers=[count(tensors, f"visual.layer{i}.") for i in (1, 2, 3, 4)],
                heads=heads(features, features / (vision.get("head_width") or 64)),
                image_size=32 * math.isqrt(tokens - 1))


class Bottleneck(nn.Module):
    """Three convolutions with a skip connection."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        # Average pooling replaces strides, so that every pixel contributes.
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or inputs != 4 * planes:
            conv = nn.Conv2d(inputs, 4 * planes, 1, bias=False)
            parts = {"-1": self.pool, "0": conv, "1": nn.BatchNorm2d(4 * planes)}
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        return F.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


class AttentionPool(nn.Module):
    """Pools positions by attention, with their mean as the query."""

    def __init__(self, tokens, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(tokens + 1, width) * width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x):
        """Maps features [B, D, h, w] to [B, E]."""
        x = x.flatten(2).transpose(1, 2)  # [B, D, h, w] -> [B, T, D]
        x = torch.cat([x.mean(1, keepdim=True), x], 1)  # [B, 1 + T, D]
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)  # only the mean token is a query
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, ., D/H]
        x = F.scaled_dot_product_attention(q, k, v)  # [B, H, 1, D/H]
        return self.c_proj(x.transpose(1, 2).flatten(1))  # [B, E]


class ModifiedResNet(nn.Module):
    """RN50 and RN101: a stem of three convolutions, anti-aliased strides, and attention as the last pool.

    arch: a dict with width, layers (four ints), heads, embed_dim, image_size.
    """

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
                layer.append(Bottleneck(inputs, planes, stride=2 if i > 0 and j == 0 else 1))
                inputs = 4 * planes
            self.add_module(f"layer{i + 1}", layer)
        tokens = (arch["image_size"] // 32) ** 2
        self.attnpool = AttentionPool(tokens, inputs, arch["heads"], arch["embed_dim"])

    def forward(self, x):
        """Maps normalized images [B, 3, S, S] to features [B, E], E = embed_dim."""
        if x.is_cuda:  # cuDNN's fastest layout, which the convolutions pass on
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))
        return self.attnpool(x)


# ConvNeXt

EPS = 1e-6  # of every LayerNorm


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of features [B, D, h, w].

    Its output has the channels of a position side by side in memory (channels_last). Convolutions keep this
    layout, in which LayerNorm and linear layers need no copy.
    """

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mlp(inputs, hidden, outputs, bias):
    """Returns two linear layers with a GELU between them; bias: whether the second one has a bias."""
    fc1, fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs, bias)
    return nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))


class ConvNeXtBlock(nn.Module):
    """A convolution that mixes positions, then an MLP that mixes channels, added to the block's input."""

    def __init__(self, width):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)  # each channel on its own
        self.norm = nn.LayerNorm(width, EPS)
        self.mlp = mlp(width, 4 * width, width, bias=True)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))  # layer scale: at first, a block does little

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # [B, D, h, w] -> [B, h, w, D]
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)  # [B, D, h, w]


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022) with timm's names, and OpenCLIP's projection, linear or an MLP, as the head.

    arch: a dict with widths and layers (four ints each, one per stage), embed_dim, mlp_head.
    """

    def __init__(self, arch):
        super().__init__()
        widths, embed_dim = arch["widths"], arch["embed_dim"]
        inputs, stages = widths[0], nn.Sequential()
        stem = nn.Sequential(nn.Conv2d(3, inputs, 4, stride=4), ChannelNorm(inputs, EPS))
        for i, (width, blocks) in enumerate(zip(widths, arch["layers"], strict=True)):
            halve = nn.Sequential(ChannelNorm(inputs, EPS), nn.Conv2d(inputs, width, 2, stride=2))
            parts = dict(downsample=halve if i > 0 else nn.Identity(),
                         blocks=nn.Sequential(*(ConvNeXtBlock(width) for _ in range(blocks))))
            stages.append(nn.Sequential(OrderedDict(parts)))
            inputs = width
        norm = nn.Sequential(OrderedDict(norm=nn.LayerNorm(width, EPS)))
        self.trunk = nn.Sequential(OrderedDict(stem=stem, stages=stages, head=norm))
        head = (dict(mlp=mlp(width, 2 * embed_dim, embed_dim, bias=False)) if arch["mlp_head"]
                else dict(proj=nn.Linear(width, embed_dim, bias=False)))
        self.head = nn.Sequential(OrderedDict(head))

    def forward(self, x):
        """Maps normalized images [B, 3, S, S], S >= 32, to features [B, E], E = embed_dim."""
        x = self.trunk.stages(self.trunk.stem(x))  # [B, 3, S, S] -> [B, D, S/4, S/4] -> [B, D', S/32, S/32]
        return self.head(self.trunk.head(x.mean((2, 3))))  # [B, D'] -> [B, E]
