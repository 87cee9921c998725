"""A reward inside of transformers' generate."""
import math

import torch

import prt


class RewardProcessor:
    """A reward as a logits processor for transformers: input_ids [B, T], scores [B, V] -> log-probabilities.

    model: the reward. beta: as in `tilt` (default: that of its training). pad: id of the padding on the left
    of prompts. size: number of tokens in the tokenizer, if the output matrices have more rows.
    """

    def __init__(self, model, beta=None, pad=None, size=None):
        self.trained_beta = getattr(model, "info", {}).get("beta", 1.0)
        self.model, self.beta, self.pad, self.size = model, beta or self.trained_beta, pad, size
        self.seen, self.cache = None, None

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        B, T = input_ids.shape
        pad = None if self.pad is None else (input_ids != self.pad).long().argmax(-1)  # [B]
        start = self.shared_prefix(input_ids, pad)
        if start == 0 or self.cache.length < T:
            start, self.cache = 0, self.model.cache(B, min(2 * T + 64, self.model.arch["positions"]), pad)
        self.cache.at, self.seen = start, None  # set again below, unless the model raises an error
        features = self.model.features(input_ids[:, start:], self.cache)[:, -1]
        r = prt.reward(self.model.head(features), beta=self.trained_beta)
        self.seen = input_ids.clone()
        out = torch.full_like(scores, -math.inf, dtype=torch.float32)
        out[:, :self.size] = prt.tilt(scores[:, :self.size], r[:, :self.size], self.beta)
        return out

    def shared_prefix(self, ids, pad):
        """Returns how many leading tokens of ids [B, T] are already in the cache, at most T - 1."""
        if self.seen is None or len(self.seen) != len(ids) or not (pad is None or pad.equal(self.cache.pad)):
            return 0
        n = min(ids.shape[1] - 1, self.seen.shape[1])
        return int((ids[:, :n] == self.seen[:, :n]).all(0).long().cumprod(0).sum())
