"""GPT-2 and the Llama architecture (Llama 2 and 3, Qwen2, Falcon3) in one decoder.

Parameters have the names of Llama's public checkpoints, less their "model." prefix; models/weights.py renames
GPT-2's. An architecture is a dict of plain values: family ("gpt2", "llama", or "qwen2", which is Llama with
biases on q, k, v), vocab, width, layers, heads, kv_heads, head_width, mlp (its inner width), positions (how
many it was made for), eps, tied (the output matrix is the embedding), rope (theta, and llama3: its scaling),
end (the id of the end token).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Cache:
    """Keys and values of each layer, allocated once. `at` places are filled; a smaller `at` rolls back.

    pad [B]: how many places at the left of each row are padding, at which no other place looks. None: none.
    """

    def __init__(self, arch, batch, length, device, dtype, pad=None):
        shape = batch, arch["kv_heads"], length, arch["head_width"]
        layers = range(arch["layers"])
        self.kv = [[torch.empty(shape, device=device, dtype=dtype) for _ in "kv"] for _ in layers]
        self.at, self.length, self.pad = 0, length, pad


def frequencies(rope, width):
    """RoPE's angles per position, float32 [width / 2]; rope_type "llama3" (3.1, 3.2) slows the low ones."""
    f = rope["theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if scaling := rope.get("llama3"):
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 where many turns fit into the old context
        f = f * (keep + (1 - keep) / scaling["factor"])
    return f


def rotate(x, cos, sin):
    """RoPE on x [B, H, T, D], whose first and second half are the pairs' coordinates.

    (a, b) becomes (a cos - b sin, b cos + a sin). cos, sin [T, D]: for both halves, the sines of the first
    one negative.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.heads, self.kv_heads = arch["heads"], arch["kv_heads"]
        inner, kv = (n * arch["head_width"] for n in (self.heads, self.kv_heads))
        bias = arch["family"] != "llama"
        self.q_proj = nn.Linear(arch["width"], inner, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(arch["width"], kv, bias=bias) for _ in "kv")
        self.o_proj = nn.Linear(inner, arch["width"], bias=arch["family"] == "gpt2")

    def forward(self, x, rope, mask, kv, where, end):
        q, k, v = (f(x).view(*x.shape[:2], n, -1).transpose(1, 2)  # [B, H, T, D/H]
                   for f, n in ((self.q_proj, self.heads), (self.k_proj, self.kv_heads),
                                (self.v_proj, self.kv_heads)))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if kv is not None:
            for new, old in zip((k, v), kv):
                old[:, :, where] = new.to(old.dtype)
            k, v = (old[:, :, :end].to(q.dtype) for old in kv)  # [B, H_kv, end, D/H]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and x.shape[1] > 1,
                                           enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(x.transpose(1, 2).flatten(2))  # [B, T, D]


class MLP(nn.Module):
    def __init__(self, arch):
        super().__init__()
        gpt2 = arch["family"] == "gpt2"
        self.gate_proj = None if gpt2 else nn.Linear(arch["width"], arch["mlp"], bias=False)
        self.up_proj = nn.Linear(arch["width"], arch["mlp"], bias=gpt2)
        self.down_proj = nn.Linear(arch["mlp"], arch["width"], bias=gpt2)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def norm(arch):
    return (nn.LayerNorm if arch["family"] == "gpt2" else nn.RMSNorm)(arch["width"], eps=arch["eps"])


class Block(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.input_layernorm, self.self_attn = norm(arch), Attention(arch)
        self.post_attention_layernorm, self.mlp = norm(arch), MLP(arch)

    def forward(self, x, *how):
        x = x + self.self_attn(self.input_layernorm(x), *how)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.arch, width = arch, arch["width"]
        self.size = arch["vocab"]  # how many logits `head` gives: fewer, where padded rows are cut off
        self.recompute = False  # activation checkpointing: of a block, only the input is kept for backward
        self.embed_tokens = nn.Embedding(arch["vocab"], width)
        self.embed_positions = nn.Embedding(arch["positions"], width) if arch["family"] == "gpt2" else None
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch["layers"]))
        self.norm = norm(arch)
        self.lm_head = None if arch["tied"] else nn.Linear(width, arch["vocab"], bias=False)
        rope = frequencies(arch["rope"], arch["head_width"]) if arch["rope"] else None
        self.register_buffer("rope", rope, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # GPT-2's scaling of what adds to the residual stream
                depth = 2 * arch["layers"] if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(p, std=0.02 if "embed" in name else (depth * p.shape[1]) ** -0.5)

    def cache(self, batch, length, pad=None):
        """For `length` places, or fewer, where the model has fewer positions."""
        weight = self.embed_tokens.weight
        return Cache(self.arch, batch, min(length, self.arch["positions"]), weight.device, weight.dtype, pad)

    def features(self, ids, cache=None, at=None):
        """Token ids [B, T], behind those in the cache -> what the output matrix reads, [B, T, D].

        at [1]: the place of the first of them, where it is a tensor and not cache.at, which then stays as it
            is: one compiled step serves all places, since it attends to the whole cache and masks.
        Raises ValueError where they are more than the model has positions, or the cache places.
        """
        T = ids.shape[1]
        if at is None:
            start = cache.at if cache else 0
            end, room = start + T, cache.length if cache else self.arch["positions"]
            if end > room:
                raise ValueError(f"{end} tokens, but this model has room for {room} (--length, --new-tokens)")
            places, where = torch.arange(start, end, device=ids.device), slice(start, end)
        else:
            places = where = at + torch.arange(T, device=ids.device)
            start, end = None, cache.length
        pad = cache.pad if cache else None
        positions, mask, rope = places, None, None
        if pad is not None:
            positions = (places - pad[:, None]).clamp(min=0)  # [B, T]
        if pad is not None or start is None or start and T > 1:  # else a causal pass over all, or one token
            keys = torch.arange(end, device=ids.device)
            mask = keys <= places[:, None]  # [T, end]
            if pad is not None:  # padding sees itself alone: a row without any key would be nan
                mask = (mask & ((keys >= pad[:, None, None]) | (keys == places[:, None])))[:, None]
        x = self.embed_tokens(ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        else:
            angles = positions[..., None] * self.rope.float()  # [B or none, T, D/2H]
            angles = angles if pad is None else angles[:, None]
            cos, sin = angles.cos(), angles.sin()
            rope = [torch.cat(halves, -1) for halves in ((cos, cos), (-sin, sin))]
        for i, layer in enumerate(self.layers):
            inputs = x, rope, mask, cache.kv[i] if cache else None, where, end
            x = checkpoint(layer, *inputs, use_reentrant=False) if self.recompute else layer(*inputs)
        if cache and at is None:
            cache.at = end
        return self.norm(x)

    def head(self, features):
        """Logits [..., size] of features [..., D]."""
        matrix = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(features, matrix.weight[:self.size])

    def forward(self, ids, where=None, cache=None):
        """Token ids [B, T] -> logits [B, T, V]. With where [N], places in the flattened ids: features [N, D],
        of which training lets `head` make logits, some at a time.
        """
        x = self.features(ids, cache)
        return self.head(x) if where is None else x.flatten(0, 1)[where]
