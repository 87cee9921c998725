"""A cache of keys and values for texts that come, leave, and grow on their own, as in a server (vllm.py).

Unlike those of models/cache.py, whose texts advance together, its rows are independent of each other: a text
takes one or several tokens, takes some back, or is replaced, and no other text has to move.
"""
import torch
import torch.nn.functional as F

from models.cache import Past


class Slots:
    """The keys and values of a GPT: a row for each text, by number, that is filled from the left.

    It grows to the highest number and the longest text so far.
    """

    def __init__(self, model):
        arch, self.slots, self.starts = model.arch, [], None
        empty = model.embed_tokens.weight.new_empty(0, arch["kv_heads"], 0, arch["head_width"])
        self.kv, self.shared = [(empty, empty)] * arch["layers"], arch["heads"] // arch["kv_heads"]

    def features(self, model, ids, slots, starts):
        """Returns features [B, T, D] of B lists of T ids, which follow what is in the rows `slots` [B].

        starts [B]: at which position each list begins; what a row has from there on is written over.
        """
        self.slots, self.starts = slots, torch.tensor(starts, device=self.kv[0][0].device)
        self.grow(max(slots) + 1, max(starts) + len(ids[0]))
        return model.features(torch.tensor(ids, device=self.starts.device), self)

    def grow(self, rows, length):
        """Makes room for so many rows and positions, with as many rows and 256 positions to spare."""
        has_rows, _, has, _ = self.kv[0][0].shape
        more = 2 * rows - has_rows if rows > has_rows else 0, length + 256 - has if length > has else 0
        if any(more):
            for layer, pair in enumerate(self.kv):  # so that only one layer is there twice
                self.kv[layer] = [F.pad(x, (0, 0, 0, more[1], 0, 0, 0, more[0])) for x in pair]

    def place(self, T, at, device):
        """Returns the positions [B, T] of the new tokens, and the Past of each layer, as Cache.place."""
        positions = self.starts[:, None] + torch.arange(T, device=device)
        end, mask, rows = int(positions.max()) + 1, None, torch.tensor(self.slots, device=device)
        if self.starts.any():
            mask = torch.arange(end, device=device) <= positions[..., None]  # [B, T, end]
            mask = mask.repeat(1, self.shared, 1)[:, None]  # [B, 1, G*T, end], see gpt.Attention
        first = slice(len(rows)) if self.slots == [*range(len(rows))] else rows  # a slice is not copied
        return positions, [PastOfRows(*kv, (rows[:, None], positions, first), end, mask) for kv in self.kv]


class PastOfRows(Past):
    """A Past whose `slots` are rows [B, 1] of the cache, positions [B, T] in them, and which rows to read."""

    def extend(self, k, v):
        """Writes the new keys and values [B, KV, T, D/H]; returns all that are attended to."""
        rows, positions, read = self.slots
        for new, cached in ((k, self.keys), (v, self.values)):
            cached[rows, :, positions] = new.transpose(1, 2).to(cached.dtype)  # both [B, T, KV, D/H]
        return tuple(cached[read, :, :self.end].to(k.dtype) for cached in (self.keys, self.values))
