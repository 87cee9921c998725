"""A reward on a base that runs in vLLM: PYTHONPATH=. vllm serve BASE --logits-processors models.vllm:PRT.

Environment variables say what is added: PRT_REWARD, the path of the reward; PRT_BETA, a number, or "off" for
requests that say nothing else (default: that of its training); PRT_DTYPE, bfloat16 or float32 (default: the
base's). A request has its own beta, or "off", in its extra argument prt_beta ("vllm_xargs" of the server).

`PRT` has both interfaces of vLLM 0.32, that of the model runner V1 (CPU) and that of V2 (GPU). They differ in
how they tell which tokens a row of logits follows; the rest, `apply`, is the same.
"""
import argparse
import itertools
import os
from typing import NamedTuple

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

import prt
from models import flags, gpt, weights
from models.processor import adapt, tilted
from models.slots import Slots


class Part(NamedTuple):
    """The rows of logits of one request in a step, which follow the last len(rows) of its tokens.

    ids: its tokens from the position `start` on; those before are in the row `slot` of the cache.
    """

    rows: list
    slot: int
    start: int
    ids: list
    beta: float


class PRT(ProcessorV1, ProcessorV2):
    """Replaces the logits of a request by its tilted log-probabilities; tokens masked to -inf stay so."""

    def __init__(self, vllm_config, place, is_pin_memory=None):
        """Loads the reward. place: the device (V1), or what is known of all requests, with its device (V2).

        Raises ValueError or OSError if it does not fit the base or the engine.
        """
        config, path = vllm_config.model_config, os.environ.get("PRT_REWARD")
        if not path:
            raise ValueError("PRT_REWARD is not set: it must be the path of a reward")
        name = os.environ.get("PRT_DTYPE") or str(config.dtype).removeprefix("torch.")
        if name not in ("bfloat16", "float32"):
            raise ValueError(f"the reward's dtype is {name}: set PRT_DTYPE to bfloat16 or float32")
        if config.enable_prompt_embeds:
            raise ValueError("prompts as embeddings have no tokens, which a reward reads")
        self.states, device = (None, place) if isinstance(place, torch.device) else (place, place.device)
        self.model = weights.load(path, "prt", text=True, dtype=getattr(torch, name)).to(device)
        if (room := self.model.arch["positions"]) < config.max_model_len:
            raise ValueError(f"{path} has {room} positions, the engine {config.max_model_len}: start it with "
                             f"--max-model-len {room}")
        self.size, self.unshared = adapt(self.model, gpt.tokenizer_text(config.tokenizer))
        self.trained_beta, self.cache = self.model.info["beta"], Slots(self.model)
        self.beta = os.environ.get("PRT_BETA") or self.trained_beta
        beta_of(None, self.beta)  # raises an error before the first request
        self.requests, self.betas = {}, {}  # of V1, by row of the batch, and of V2, by slot
        self.filled = {}  # slot -> number of tokens in the cache, with the drafts of the last step

    @classmethod
    def validate_params(cls, params):
        """Raises ValueError, which the server answers with, if a request's prt_beta is neither kind."""
        beta_of(params.extra_args, "off")

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        """V1: takes note of the requests that come, leave, and move to another row of the batch."""
        process_dict_updates(self.requests, batch_update, self.new_request)

    def new_request(self, params, prompt, output):
        """V1: returns a free slot, beta, and the tokens of a request; None if it declines the reward.

        The list `output` grows. It is not empty if the request was preempted.
        """
        if (beta := beta_of(params.extra_args, self.beta)) is None:
            return None
        slot = min({*range(len(self.requests) + 1)} - {slot for slot, *_ in self.requests.values()})
        self.filled[slot] = 0
        return slot, beta, prompt, output

    def add_request(self, req_idx, sampling_params):
        """V2: takes note of a request in a slot; returns whether it takes the reward."""
        self.betas[req_idx] = beta_of(sampling_params.extra_args, self.beta)
        self.filled[req_idx] = 0
        return self.betas[req_idx] is not None

    def batch(self):
        """V1: returns the Parts of the batch. Its newest ids are known only now, not in update_state."""
        parts = []
        for row, (slot, beta, prompt, output) in self.requests.items():
            n = len(prompt)
            start = min(self.filled[slot], n + len(output) - 1)
            parts.append(Part([row], slot, start, prompt[start:] + output[max(start - n, 0):], beta))
        return parts

    def context(self, ctx):
        """V2: returns the Parts of the batch. The rows of a request follow its last token and its drafts."""
        slots, positions, ids = (x.tolist() for x in (ctx.expanded_idx_mapping, ctx.pos, ctx.input_ids))
        parts = []
        for slot, rows in itertools.groupby(range(len(slots)), slots.__getitem__):
            rows = [*rows]
            if self.betas[slot] is not None:
                first = positions[rows[0]]
                start = min(self.filled[slot], first)  # over drafts that were rejected
                before = self.states.all_token_ids.gpu[slot, start:first].tolist()
                parts.append(Part(rows, slot, start, before + [ids[i] for i in rows], self.betas[slot]))
        return parts

    @torch.no_grad()
    def apply(self, logits, ctx=None):
        """Tilts logits [rows, V], in place, with one pass for all parts of a length. ctx: V2's batch."""
        parts = sorted(self.batch() if ctx is None else self.context(ctx), key=lambda x: (len(x.ids), x.slot))
        features = []
        for _, group in itertools.groupby(parts, lambda part: len(part.ids)):
            group = [*group]
            _, slots, starts, ids, _ = map(list, zip(*group))
            ids = [[min(i, self.size - 1) for i in row] for row in ids]  # rows of the base without a token
            new = self.cache.features(self.model, ids, slots, starts)  # [B, T, D]
            for part, x in zip(group, new):
                features.append(x[-len(part.rows):])
                self.filled[part.slot] = part.start + len(part.ids)
        if parts:
            rows = torch.tensor([i for part in parts for i in part.rows], device=logits.device)
            beta = torch.tensor([[part.beta] for part in parts for _ in part.rows], device=logits.device)
            r = prt.reward(self.model.head(torch.cat(features)), beta=self.trained_beta)
            logits[rows] = tilted(logits[rows], r, beta, self.size, self.unshared).to(logits.dtype)
        return logits


def beta_of(extra_args, default):
    """Returns the beta of a request, or None for "off". Raises ValueError if it is no number either."""
    value = (extra_args or {}).get("prt_beta", default)
    try:
        return None if value == "off" else flags.BETA(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f'prt_beta is {value!r:.50}, not a number from 1e-6 to 1e12, or "off"') from None
