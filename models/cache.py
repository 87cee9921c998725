"""The cached keys and values of a GPT, for text that grows: prt.generate, and decode.py's faster forms."""
import functools
from typing import NamedTuple

import torch


class Past(NamedTuple):
    """What one layer needs of a cache in a forward pass over T new tokens."""

    keys: torch.Tensor  # [B, KV, length, D/H]
    values: torch.Tensor  # [B, KV, length, D/H]
    slots: slice | torch.Tensor  # where the new tokens go
    end: int  # how many positions are attended to
    # Which of them each query attends to, bool [G*T, end] or [B, 1, G*T, end], with G as in gpt.Attention;
    # None for causal attention.
    mask: torch.Tensor | None

    def extend(self, k, v):
        """Writes the new keys and values [B, KV, T, D/H]; returns all that are attended to."""
        for new, cached in ((k, self.keys), (v, self.values)):
            cached[:, :, self.slots] = new.to(cached.dtype)
        return self.keys[:, :, :self.end].to(k.dtype), self.values[:, :, :self.end].to(k.dtype)


class Cache:
    """The keys and values of all layers, allocated once; the first `at` positions are filled.

    Setting a smaller `at` drops the last tokens. pad [B]: how many positions on the left of each row are
    padding, to which no other position attends.
    """

    def __init__(self, arch, batch, length, device, dtype, pad=None):
        shape = batch, arch["kv_heads"], length, arch["head_width"]
        empty = functools.partial(torch.empty, shape, device=device, dtype=dtype)
        self.kv = [(empty(), empty()) for _ in range(arch["layers"])]
        self.at, self.length, self.pad, self.shared = 0, length, pad, arch["heads"] // arch["kv_heads"]

    def place(self, T, at, device):
        """Makes room for T new tokens; returns their positions, [T] or [B, T], and the Past of each layer.

        at: for compiled steps, the position of the first token as a tensor [1]. One graph then serves all
        positions, since it attends to the whole cache with a mask, and self.at is not changed. Without it,
        raises ValueError if the tokens exceed the cache.
        """
        if at is None:
            start, end = self.at, self.at + T
            check_room(end, self.length)
            positions, slots, self.at = torch.arange(start, end, device=device), slice(start, end), end
            causal = start == 0 or T == 1  # over all keys, or one token that sees all of them
        else:
            positions = slots = at + torch.arange(T, device=device)
            end, causal = self.length, False
        mask = None
        if not causal or self.pad is not None:
            mask = attention_mask(positions, end, self.pad)
            mask = torch.cat([mask] * self.shared, -2)  # see gpt.Attention
        if self.pad is not None:
            positions = (positions - self.pad[:, None]).clamp(min=0)
        return positions, [Past(*kv, slots, end, mask) for kv in self.kv]


def check_room(length, room):
    """Raises ValueError if `length` is above `room`, the positions of a model or of a cache."""
    if length > room:
        raise ValueError(f"{length} tokens, but this model has room for {room}")


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
