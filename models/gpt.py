"""GPT-2 and the Llama architecture (Llama 2 and 3, Qwen2, Falcon3) in one decoder.

Parameters have the names of Llama's public checkpoints, without their "model." prefix; models/weights.py
renames GPT-2's. An architecture is a dict of plain values:

    vocab, width, layers, heads, kv_heads, head_width, mlp (inner width), positions (at most), eps, tied (the
    output matrix is the embedding), end (id of the end token), rope (theta and llama3, the scaling, or None
    for learned positions), layer_norm (False: RMSNorm), gated_mlp, qkv_bias, bias (of o_proj and the MLP)
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Cache:
    """The keys and values of all layers, allocated once; the first `at` positions are filled.

    Setting a smaller `at` drops the last tokens. pad [B]: how many positions on the left of each row are
    padding, to which no other position attends.
    """

    def __init__(self, arch, batch, length, device, dtype, pad=None):
        shape = batch, arch["kv_heads"], length, arch["head_width"]
        empty = functools.partial(torch.empty, shape, device=device, dtype=dtype)
        self.kv = [(empty(), empty()) for _ in range(arch["layers"])]
        self.at, self.length, self.pad = 0, length, pad


class Context(NamedTuple):
    """The inputs that all layers share in one forward pass over T new tokens."""

    rope: tuple | None  # cosines and sines of the positions' angles, each [T, D/H] or [B, 1, T, D/H]
    # Which keys each query attends to, bool [G*T, keys] or [B, 1, G*T, keys], with G as in Attention.
    mask: torch.Tensor | None
    slots: slice | torch.Tensor | None  # where the tokens' keys and values go in the cache
    keys: int | None  # how many positions of the cache are attended to


def frequencies(rope, width):
    """Returns RoPE's radians per position, float32 [head width / 2]; llama3 lowers the small ones."""
    f = rope["theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if scaling := rope.get("llama3"):
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 if many turns fit into the original context
        f = f * (keep + (1 - keep) / scaling["factor"])
    return f


def rotate(x, cos, sin):
    """Applies RoPE to x [B, H, T, D/H]: rotates pairs (a, b), a from the first half of x, b from the second.

    (a, b) becomes (a cos - b sin, b cos + a sin). cos, sin [T, D/H] or [B, 1, T, D/H] hold each value twice,
    the first negated in sin: a roll and one fused multiply-add are faster on a CPU than separate halves.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attention_mask(positions, keys, pad):
    """Returns the causal mask of tokens at positions [T] over the first `keys` positions, bool [T, keys].

    With pad [B], as in `Cache`: [B, 1, T, keys]. Padding attends to itself, since softmax over no key is nan.
    """
    key = torch.arange(keys, device=positions.device)
    mask = key <= positions[:, None]
    if pad is None:
        return mask
    not_padding = key >= pad[:, None, None]  # [B, 1, keys]
    return (mask & (not_padding | (key == positions[:, None])))[:, None]


class Attention(nn.Module):
    """Causal self-attention with a KV cache; G = heads / kv_heads heads share their keys and values."""

    def __init__(self, arch):
        super().__init__()
        self.heads, self.kv_heads = arch["heads"], arch["kv_heads"]
        inner, kv = (n * arch["head_width"] for n in (self.heads, self.kv_heads))
        self.q_proj = nn.Linear(arch["width"], inner, bias=arch["qkv_bias"])
        self.k_proj = nn.Linear(arch["width"], kv, bias=arch["qkv_bias"])
        self.v_proj = nn.Linear(arch["width"], kv, bias=arch["qkv_bias"])
        self.o_proj = nn.Linear(inner, arch["width"], bias=arch["bias"])

    def forward(self, x, context, kv):
        """Maps x [B, T, D] to [B, T, D]; kv: the layer's cached keys and values, or None."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, H, T, D/H]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # [B, KV, T, D/H]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if kv is not None:
            for new, cached in zip((k, v), kv):
                cached[:, :, context.slots] = new.to(cached.dtype)
            k, v = (cached[:, :, :context.keys].to(q.dtype) for cached in kv)  # [B, KV, keys, D/H]
        if context.mask is None and x.shape[1] > 1:
            if q.is_cuda and q.dtype == torch.float32:  # no fused kernel for float32 takes shared keys
                k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < self.heads)
        else:
            # No fused kernel takes both a mask and shared keys: the G heads that share keys become one head
            # with G*T queries.
            q = q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)  # [B, H, T, D/H] -> [B, KV, G*T, D/H]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask)
            y = y.unflatten(2, (-1, x.shape[1])).flatten(1, 2)  # [B, KV, G*T, D/H] -> [B, H, T, D/H]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, H, T, D/H] -> [B, T, D]


class MLP(nn.Module):
    """GPT-2's MLP with GELU, or the gated one of Llama."""

    def __init__(self, arch):
        super().__init__()
        width, inner, bias = arch["width"], arch["mlp"], arch["bias"]
        self.gate_proj = nn.Linear(width, inner, bias=bias) if arch["gated_mlp"] else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def norm(arch):
    """Returns a new normalization layer."""
    return (nn.LayerNorm if arch["layer_norm"] else nn.RMSNorm)(arch["width"], eps=arch["eps"])


class Block(nn.Module):
    """Attention and MLP, each after a normalization layer and added to its input."""

    def __init__(self, arch):
        super().__init__()
        self.input_layernorm, self.self_attn = norm(arch), Attention(arch)
        self.post_attention_layernorm, self.mlp = norm(arch), MLP(arch)

    def forward(self, x, context, kv):
        x = x + self.self_attn(self.input_layernorm(x), context, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


def check_room(length, room):
    """Raises ValueError if `length` is above `room`, the positions of the model or of a cache."""
    if length > room:
        raise ValueError(f"{length} tokens, but this model has room for {room} (--length, --new-tokens)")


class GPT(nn.Module):
    """A decoder-only language model: the policy of prt.fit and prt.generate."""

    def __init__(self, arch):
        super().__init__()
        self.arch, width = arch, arch["width"]
        self.size = arch["vocab"]  # number of logits; smaller if the output matrix has rows without a token
        self.recompute = False  # activation checkpointing: only the blocks' inputs are kept for backward
        self.embed_tokens = nn.Embedding(arch["vocab"], width)
        self.embed_positions = None if arch["rope"] else nn.Embedding(arch["positions"], width)
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch["layers"]))
        self.norm = norm(arch)
        self.lm_head = None if arch["tied"] else nn.Linear(width, arch["vocab"], bias=False)
        rope = frequencies(arch["rope"], arch["head_width"]) if arch["rope"] else None
        self.register_buffer("rope", rope, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # as in GPT-2, matrices that write to the residual stream are scaled by depth
                depth = 2 * arch["layers"] if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(p, std=0.02 if "embed" in name else (depth * p.shape[1]) ** -0.5)

    def cache(self, batch, length, pad=None):
        """Returns an empty cache for `length` positions. Raises ValueError if the model has fewer."""
        check_room(length, self.arch["positions"])
        weight = self.embed_tokens.weight
        return Cache(self.arch, batch, length, weight.device, weight.dtype, pad)

    def features(self, ids, cache=None, at=None):
        """Returns features [B, T, D], the input of `head`, for token ids [B, T] that follow the cached ones.

        at: for compiled steps, the position of the first token as a tensor [1]. One graph then serves all
        positions, since it attends to the whole cache with a mask. cache.at is not changed. Without `at`,
        raises ValueError if the tokens exceed the model's positions or the cache.
        """
        T, pad, mask = ids.shape[1], cache.pad if cache else None, None
        if at is None:
            start = cache.at if cache else 0
            keys = start + T
            check_room(keys, cache.length if cache else self.arch["positions"])
            positions, slots = torch.arange(start, keys, device=ids.device), slice(start, keys)
            whole = start == 0 or T == 1  # causal attention over all keys, or one token that sees all of them
        else:
            positions = slots = at + torch.arange(T, device=ids.device)
            keys, whole = cache.length, False
        if not whole or pad is not None:
            mask = attention_mask(positions, keys, pad)
            mask = torch.cat([mask] * (self.arch["heads"] // self.arch["kv_heads"]), -2)  # see Attention
        x, rope = self.embed(ids, positions if pad is None else (positions - pad[:, None]).clamp(min=0))
        # Without a cache, slots and keys are None: torch.compile would recompile for every new length.
        context = Context(rope, mask, *(slots, keys) if cache else (None, None))
        for i, layer in enumerate(self.layers):
            inputs = x, context, cache.kv[i] if cache else None
            x = checkpoint(layer, *inputs, use_reentrant=False) if self.recompute else layer(*inputs)
        if cache and at is None:
            cache.at = keys
        return self.norm(x)

    def embed(self, ids, positions):
        """Returns the embeddings [B, T, D] of ids [B, T] at positions [T] or [B, T], and `Context.rope`."""
        x = self.embed_tokens(ids)
        if self.embed_positions is not None:
            return x + self.embed_positions(positions), None
        angles = positions[..., None] * self.rope.float()  # [T, D/2H] or [B, T, D/2H]
        if positions.ndim == 2:
            angles = angles.unsqueeze(1)  # [B, 1, T, D/2H]: the same for all heads
        cos, sin = angles.cos(), angles.sin()
        return x, (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))

    def head(self, features):
        """Maps features [..., D] to logits [..., size] of the first `size` tokens of the vocabulary."""
        matrix = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(features, matrix.weight)[..., :self.size]  # autocast caches casts of whole weights

    def forward(self, ids, index=None, cache=None):
        """Maps token ids [B, T] to logits [B, T, V], or to features [N, D] if index is given.

        index [N]: the positions in ids.flatten() to return features of. In training, prt.fit calls `head` for
        a chunk of them at a time.
        """
        x = self.features(ids, cache)
        return self.head(x) if index is None else x.flatten(0, 1)[index]
