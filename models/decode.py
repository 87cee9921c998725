"""Faster decoding than prt.generate, with the same results (samples: the same distribution).

`speculative`: small models draft a few tokens, and the base checks all of them in one pass. `compiled`: each
step after the prompt runs as one compiled graph.
"""
import functools
import math
import weakref

import torch
import torch.nn.functional as F

import prt
from models.sampling import probabilities, sample

CACHES = weakref.WeakKeyDictionary()  # model -> its newest KV cache for compiled steps
DRAFTS = (0, 1, 4, 8, 16)  # how many tokens may be drafted: each number needs a graph of its own


@torch.no_grad()
def speculative(base, rewards, ids, *, length, end=None, pad=None, temperature=0.0, top_p=1.0, generator=None,
                drafter=None, compile=False):
    """Returns what prt.generate does, by speculative sampling (Leviathan et al. 2023; Chen et al. 2023).

    drafter: the (base, rewards) that draft tokens, of which `accept` keeps some. Models that also decode run
    once. Default: the first reward alone (in EFT, the tuned source), or the base if there is no reward. The
    reward with its source is the tuned source: it drafts better, but one more model runs.

    Other arguments as in prt.generate and sampling.sampler. With compile, steps run as compiled graphs, as in
    `compiled`. Best for small batches, since all rows advance by the same number of tokens. Synchronizes the
    device after every pass of the base and, if `end` is given, after every drafted token (not with compile).
    """
    drafter = drafter or (rewards[0][1] if rewards else base, [])
    B, total, end = len(ids), ids.shape[1] + length, [end] if isinstance(end, int) else end
    drafting = open_caches([(1.0, drafter[0]), *drafter[1]], B, total, pad, compile)
    others = [(weight, model) for weight, model in [(1.0, base), *rewards] if model not in drafting]
    checking = open_caches(others, B, total, pad, compile)
    distribution = functools.partial(probabilities, temperature=temperature, top_p=top_p)
    out, new = ids, ids  # new: the last tokens of `out`, which are not in the caches yet
    # k: how many tokens to draft, up to the next number of DRAFTS if all were accepted, else down to how many
    # were. To begin with 8 was faster than with 4 where drafts are good (tests/RESULTS.md).
    ended, k = torch.zeros(B, dtype=torch.bool, device=ids.device), 8
    while out.shape[1] < total:
        at = out.shape[1] - new.shape[1]
        k = max(n for n in DRAFTS if n <= min(k, total - out.shape[1] - 1))
        drafts, q, logits = draft(drafter, drafting, new, at, k, ended, end, distribution, generator, compile)
        k = drafts.shape[1]
        logits |= next_logits(checking, torch.cat([new, drafts], 1), at, k + 1, compile)
        p = distribution(prt.combine(base, rewards, logits.get))  # [B, k + 1, V]
        new, ended = fill_after_end(accept(p, q, drafts, ended, generator), ended, end)
        accepted = new.shape[1] - 1
        k = min((n for n in DRAFTS if n > k), default=k) if accepted == k else max(accepted, 1)
        out = torch.cat([out, new], 1)
        new = new[:, -1:].clone(memory_format=torch.contiguous_format)  # strides of a slice would recompile
        if end is not None and ended.all():
            break
    return F.pad(out, (0, total - out.shape[1]), value=end and end[0])


def draft(drafter, caches, new, at, k, ended, end, distribution, generator, compile):
    """Drafts up to k tokens after the tokens `new` [B, T], the first of which has position `at`.

    drafter: (base, rewards). caches: model -> KV cache. ended [B]: rows that have ended. If all have,
    drafting stops, but not with compile, since fewer drafts may need another graph. distribution:
    log-probabilities -> probabilities. Returns drafts [B, k], the distributions q [B, k, V] that they were
    sampled from, and model -> logits [B, k + 1, V], with those after the last draft.
    """
    base, rewards = drafter
    drafts, q, logits = [], [], [next_logits(caches, new, at, 1, compile)]
    while len(drafts) < k and (compile or end is None or not ended.all()):
        q.append(distribution(prt.combine(base, rewards, logits[-1].get)))
        at, new = at + new.shape[1], sample(q[-1], generator)  # [B, 1]
        drafts.append(new)
        ended = ended | (sum(new[:, 0] == i for i in end or ()) > 0)
        logits.append(next_logits(caches, new, at, 1, compile))
    x = logits[0][base]  # [B, 1, V]
    return (torch.cat([new[:, :0], *drafts], 1), torch.cat([x[:, :0], *q], 1),
            {model: torch.cat([step[model] for step in logits], 1) for model in caches})


def accept(p, q, drafts, ended, generator=None):
    """Returns n accepted drafts and one more token, [B, n + 1], distributed as p (Leviathan et al., Alg. 1).

    p [B, k + 1, V]: the target distributions after 0 to k drafts. q [B, k, V]: the distributions that the
    drafts [B, k] were sampled from. ended [B]: rows that have ended, whose tokens are ignored.

    The first rejected draft is replaced by a sample of `residual`, and the drafts after it are dropped. If
    all k are accepted, a sample of p follows. All rows are cut to the length of the shortest, so that their
    caches stay aligned. The cut does not depend on the tokens that it drops, so samples stay unbiased.
    """
    k = drafts.shape[1]
    q = torch.cat([q, torch.zeros_like(p[:, :1])], 1)  # [B, k + 1, V]: nothing is drafted after the last one
    p_y, q_y = (x[:, :k].gather(-1, drafts[..., None])[..., 0] for x in (p, q))  # [B, k]
    accepted = accepted_drafts(p_y, q_y, torch.rand(drafts.shape, device=p.device, generator=generator))
    n = int(accepted.masked_fill(ended, k).min())
    token = sample(residual(p[:, n], q[:, n]), generator)  # [B]
    if n < k:
        token = torch.where(accepted > n, drafts[:, n], token)
    return torch.cat([drafts[:, :n], token[:, None]], 1)


def accepted_drafts(p_y, q_y, u):
    """Returns how many drafts each row accepts before the first rejected one, [B].

    A draft y is accepted with probability min(1, p(y) / q(y)). p_y, q_y [B, k]: p(y) and q(y) of the drafts.
    u [B, k]: uniform random numbers from [0, 1).
    """
    return (u * q_y < p_y).long().cumprod(1).sum(1)


def residual(p, q):
    """Returns max(p - q, 0), [B, V], not normalized; p itself in rows where p equals q."""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


@torch.no_grad()
def compiled(base, rewards, ids, *, length, end=None, pad=None, draw=lambda log_probs: log_probs.argmax(-1)):
    """prt.generate with torch.compile for the steps after the prompt, and with CUDA graphs on CUDA.

    Compilation takes a minute or two for each set of models, batch size, and length (in steps of 128), unless
    there is a cache of that batch size and at least that length. The newest cache of each model stays
    allocated. Do not train the models afterward: on a CPU their weights are constants of the graph.
    """
    (B, T), end = ids.shape, [end] if isinstance(end, int) else end
    caches = open_caches([(1.0, base), *rewards], B, T + length, pad, compile=True)
    out, new, ended = ids, ids, torch.zeros(B, dtype=torch.bool, device=ids.device)
    for step in range(length):
        logits = next_logits(caches, new, out.shape[1] - new.shape[1], 1, compile=True)
        new, ended = fill_after_end(draw(prt.combine(base, rewards, logits.get)), ended, end)
        out = torch.cat([out, new], 1)
        if end is not None and step % 8 == 7 and ended.all():  # synchronizes the device: every 8th step only
            break
    return F.pad(out, (0, T + length - out.shape[1]), value=end and end[0])


def fill_after_end(new, ended, end):
    """Replaces the tokens after a row's first end token by end[0], in new tokens [B, n].

    ended, bool [B]: rows that ended before. end: list of ids, or None. Returns the tokens and the updated
    `ended`.
    """
    if end is None:
        return new, ended
    ends = sum(new == i for i in end) > 0
    # The difference counts the end tokens before each position of `new`.
    new = new.masked_fill(ended[:, None] | (ends.cumsum(1) - ends.long() > 0), end[0])
    return new, ended | ends.any(1)


def next_logits(caches, tokens, at, n, compile):
    """Returns model -> logits after each of the last n of the tokens [B, T], [B, n, V].

    caches: model -> KV cache. at: the position of the first token. Cache entries from there on (of dropped
    drafts) are overwritten.
    """
    for cache in caches.values():
        cache.at = at
    if not compile or at == 0:  # the prompt is scored once, and compiling would take longer
        return dict(zip(caches, last_logits(list(caches.items()), tokens, n)))
    torch.compiler.cudagraph_mark_step_begin()
    step = compiled_logits(tokens.device.type)
    at = torch.full((1,), at, device=tokens.device)
    # A CUDA graph overwrites its outputs in the next step, and drafting needs them after that.
    return {model: x.clone() for model, x in zip(caches, step(list(caches.items()), tokens, n, at))}


def last_logits(models, tokens, n, at=None):
    """Returns the list of logits [B, n, V] after each of the last n tokens for a list of (model, cache).

    at: None, or the first token's position as a tensor [1], as in the `features` of models/gpt.py.
    """
    return [model.head(model.features(tokens, cache, at)[:, -n:]) for model, cache in models]


@functools.cache
def compiled_logits(device_type):
    """Returns `last_logits`, compiled: all models in one graph."""
    torch._dynamo.config.recompile_limit = 64  # instead of 8: a graph for each set of models and shape
    if device_type == "cuda":
        return torch.compile(last_logits, mode="reduce-overhead")
    # On a CPU: network weights as constants, packed for the fastest of several matrix products.
    # As `options` of torch.compile, freezing has no effect.
    silent = dict(autotune_num_choices_displayed=0, max_autotune_report_choices_stats=False)
    torch._inductor.config.load_config(dict(freezing=True, max_autotune=True, **silent))
    return torch.compile(last_logits)


def open_caches(terms, batch, length, pad, compile):
    """Returns model -> empty KV cache for `length` positions, prompt included; terms: (weight, model)s."""
    make = static_cache if compile else lambda model, *shape: model.cache(*shape)
    return {model: make(model, batch, length, pad) for _, model in terms}


def static_cache(model, batch, length, pad):
    """Returns a cache for compiled steps: the model's newest one if it has the batch size and is long enough.

    A CUDA graph needs fixed memory addresses, and every length a separate graph: lengths are rounded up to
    multiples of 128, and the longest text of a table should come first.
    """
    cache = CACHES.get(model)
    if cache is None or len(cache.kv[0][0]) != batch or cache.length < length:
        length = max(length, min(math.ceil(length / 128) * 128, model.arch["positions"]))
        cache = CACHES[model] = None  # frees its memory, before there is a new one
        cache = CACHES[model] = model.cache(batch, length)
        for tensor in (x for pair in cache.kv for x in pair):
            tensor.zero_()  # a masked value is multiplied by 0, and uninitialized memory may hold nan
            torch._dynamo.mark_static_address(tensor, guard=False)
    cache.pad = pad
    return cache
