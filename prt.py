"""Portable Reward Tuning (Chijiwa et al., ICML 2025, arXiv 2502.12776): the method, in one file.

Fine-tuning moves a base distribution towards labelled data. Portable reward tuning keeps what moved it: a
network r(x, y), trained by cross-entropy on

    pi_r(y|x) = pi_base(y|x) exp(r(x, y) / beta) / Z(x)                                          (eq. 5, 6)

while the base stays frozen. The same r is then added to the log-probabilities of any other base with the same
labels, without further training.

`reward`, `tilt` and `prt_loss` are the maths, `fit` is Algorithm 1, `generate` Algorithm 2. Nothing here
knows images, text or files: a policy is any module that maps inputs to logits [..., L].
"""
import argparse
import functools
import math
import os
import sys
import time
import weakref
from itertools import repeat

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # saved as one process would save it
KEPT = weakref.WeakKeyDictionary()  # policy -> the caches of its compiled steps


def reward(logits, ref_logits=None, beta=1.0):
    """The reward that a network stands for: beta * (log pi_theta - log pi_ref), float32 [..., L].

    logits, ref_logits: [..., L]. With ref_logits=None the reference is uniform and the reward is beta *
    logits, the paper's portable reward (Algorithm 1). With the source base as reference it is the implicit
    reward of fine-tuning, log pi_ft / pi_pt (Prop. 3.1), which EFT moves to another base. A reward is
    defined only up to a constant per x, which `tilt` normalises away: that is why the uniform case needs no
    log-normaliser. Raises ValueError where the label counts differ.
    """
    if ref_logits is None:
        return beta * logits.float()
    same_labels("network", logits, "reference", ref_logits)
    return beta * (F.log_softmax(logits.float(), -1) - F.log_softmax(ref_logits.float(), -1))


def tilt(base_logits, r, beta=1.0):
    """Log-probabilities of pi_base * exp(r / beta) / Z, float32 [..., L] (eq. 6; with a new base, Algorithm
    2).

    base_logits, r: [..., L]. Raises ValueError where their label counts differ.
    """
    same_labels("base", base_logits, "reward", r)
    return F.log_softmax(base_logits.float() + r.float() / beta, -1)


def prt_loss(base_logits, r, targets, beta=1.0, alpha=0.0, ignore_index=-100):
    """Cross-entropy of the tilted distribution (eq. 7) minus alpha * entropy of softmax(r) (eq. 12): scalar.

    base_logits, r: [..., L], targets: [...], labels 0..L-1. Both are means over the targets that are not
    ignore_index, 0 where there are none. With alpha 0 the gradient in r is (pi_r - onehot) / (beta * count).
    """
    log_probs = tilt(base_logits, r, beta)
    log_probs = log_probs.reshape(-1, log_probs.shape[-1])  # [N, L]
    nll = F.nll_loss(log_probs, targets.reshape(-1), ignore_index=ignore_index, reduction="sum")
    mask = targets != ignore_index
    n = mask.sum().clamp(min=1)
    if not alpha:
        return nll / n
    log_q = F.log_softmax(r.float(), -1)
    entropy = -(log_q.exp() * log_q).sum(-1)  # [...]
    return (nll - alpha * (entropy * mask).sum()) / n


def mixture(base, rewards, logits):
    """Log-probabilities, float32 [..., L], of the base tilted by rewards, which are (weight, policy) pairs:

    [] is the base alone, [(beta_train / beta, reward)] PRT, [(1, tuned), (-1, old)] EFT. logits: policy ->
    its logits [..., L].
    """
    scores = sum((weight * logits(policy).float() for weight, policy in rewards), logits(base).float())
    return F.log_softmax(scores, -1)


def same_labels(name, logits, other, other_logits):
    a, b = logits.shape[-1], other_logits.shape[-1]
    if a != b:
        raise ValueError(f"the {name} has {a} labels and the {other} {b}; they must be the same labels")


def shuffled(step, n, batch, seed):
    """Indices [batch] of training step `step`; every epoch is a fresh permutation of the n examples.

    A pure function of its arguments, so that a resumed run sees the batches it would have seen.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // n
    return torch.cat([permutation(n, seed, e)[places[epochs == e] % n] for e in epochs.unique().tolist()])


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def schedule(step, steps, warmup, decay):
    """Factor on the peak learning rate in step 0..steps-1: linear warm-up, "cosine" or "linear" decay."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if decay == "cosine" else 1 - done


def fit(policy, indices, fetch, *, steps, base=None, method="prt", beta=1.0, alpha=0.0, lr=1e-5, warmup=0,
        decay="cosine", weight_decay=0.0, clip=1.0, accum=1, seed=0, head=None, chunk=512, compile=False,
        log_every=50, save=None, save_every=None, state=None, name="fit"):
    """Algorithm 1: trains `policy` in place so that the base, tilted by its reward, predicts the targets.

    policy: module, policy(*inputs) -> logits [..., L], whose parameters with requires_grad move. Its mode is
        left alone: in eval mode BatchNorm keeps its statistics and a micro-batch's make-up cannot change
        the result.
    indices: step -> LongTensor [batch] of examples, a pure function (`shuffled`).
    fetch: (indices [b], generator) -> (inputs, targets [...], base_logits [..., L] or None) on the policy's
        device; all randomness comes from the generator. base_logits: the base's answers, where they are
        cached.
    base: the frozen policy that answers where `fetch` brings no base_logits. None is the uniform base, for
        which Algorithm 1 is plain cross-entropy training from scratch.
    method: "prt" (uniform reference), or "ft" (reference = base, so that the tilt gives pi_theta back: plain
        fine-tuning).
    head: where given, policy and base return features [N, D] for targets [N], and head(policy, features)
        are logits [N, L]. They are made for `chunk` targets at a time, and their gradient at once, so that
        the whole [N, L] is never in memory.
    accum: micro-batches a step and process. The loss is the mean over the targets of all of them together, on
        all of torchrun's processes together.
    save: called with {"model", "step", "optimizer"} every save_every steps (default: a quarter of them), and
        at the end without "optimizer".
    state: what `save` was given, to go on from there: the weights become those of a run never interrupted.

    AdamW in float32 (weight_decay 0 is the paper's Adam), its loop over the tensors fused, bf16 autocast on
    CUDA. The device is waited for only where something is logged or saved. Returns a dict per log step.
    Raises FloatingPointError, and saves nothing more, once a loss or gradient was not finite.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"a warm-up of {warmup} steps does not fit into {steps} steps; change --warmup")
    device = next(policy.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
    start = 0
    if state is not None:
        set_state_dict(policy, optimizer, options=WHOLE, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        start = state["step"]
    sharded = isinstance(policy, FSDPModule)
    ddp = None
    if world > 1 and not sharded:
        if head:
            raise ValueError("more than one process, and a head: shard the policy with fully_shard first")
        ddp = torch.nn.parallel.DistributedDataParallel(policy, broadcast_buffers=False)
    net, base_net = ddp or policy, base  # what runs, while `policy` is saved and scored
    if compile:
        net, base_net = torch.compile(net), base and torch.compile(base)

    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")

    @autocast
    def summed(features, base_features, targets, logging):
        """The loss, summed over some targets; with it, without gradient, [loss, correct, KL], summed."""
        logits = head(policy, features) if head else features
        base_logits = torch.zeros_like(logits)
        if base_features is not None:
            base_logits = head(base, base_features) if head else base_features
        r = reward(logits, base_logits if method == "ft" else None, beta)
        loss = prt_loss(base_logits, r, targets, beta, alpha) * (targets >= 0).sum()
        with torch.no_grad():
            correct = ((base_logits + r / beta).argmax(-1) == targets).sum()
            moved = kl(tilt(base_logits, r, beta), base_logits) * (targets >= 0) if logging else loss * 0
        return loss, torch.stack([loss.detach(), correct, moved.sum()])

    save_every = save_every or max(1, steps // 4)
    history, generator = [], torch.Generator()
    totals = torch.zeros(4, device=device, dtype=torch.float64)  # loss, correct, targets, gradient norm
    last, clock = start, time.perf_counter()
    bar = tqdm(total=steps, initial=start, desc=name, disable=rank > 0 or None, dynamic_ncols=True)
    for step in range(start, steps):
        end = step + 1 == steps
        logging, saving = end or (step + 1) % log_every == 0, save and (end or (step + 1) % save_every == 0)
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, warmup, decay)
        batch = indices(step)
        if len(batch) % (world * accum):
            raise ValueError(f"a batch of {len(batch)} does not split into {accum} x {world} micro-batches")
        micro = [fetch(part, generator.manual_seed((seed * 1_000_003 + step) * 1_009 + i))
                 for i, part in list(enumerate(batch.chunk(world * accum)))[rank::world]]
        count = sum((targets >= 0).sum() for _, targets, _ in micro)
        if world > 1:
            dist.all_reduce(count)
        scale = world / count.clamp(min=1)  # the gradients of the processes are averaged
        moved = torch.zeros((), device=device)
        for i, (inputs, targets, base_features) in enumerate(micro):
            if ddp:
                ddp.require_backward_grad_sync = i + 1 == len(micro)
            if sharded:
                policy.set_requires_gradient_sync(i + 1 == len(micro))
            with autocast:
                features = net(*inputs)
                # In fine-tuning the base cancels out of the loss: it is asked for the logged KL alone.
                if base_features is None and base is not None and (method == "prt" or alpha or logging):
                    with torch.no_grad():
                        base_features = base_net(*inputs)
            size = chunk if head else len(targets)
            bases = repeat(None) if base_features is None else base_features.split(size)
            leaf = features.detach().requires_grad_()
            for some in zip(leaf.split(size), bases, targets.split(size)):
                loss, sums = summed(*some, logging)
                (loss * scale).backward()
                totals[:2] += sums[:2]
                moved += sums[2]
            features.backward(leaf.grad)
            totals[2] += (targets >= 0).sum()
        norm = torch.nn.utils.clip_grad_norm_(params, clip)
        totals[3] += (norm.full_tensor() if sharded else norm) / world  # the same on all of them
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if not (logging or saving):
            continue
        if world > 1:
            dist.all_reduce(totals)
            dist.all_reduce(moved)
        loss, correct, seen, norm = totals.tolist()  # waits for the device
        loss /= max(seen, 1)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}. Stopped, the last checkpoint "
                "is kept. Start anew (another --out) with a lower --lr or a longer --warmup")
        seconds = (time.perf_counter() - clock) / (step + 1 - last)
        if logging:
            history.append(dict(step=step + 1, loss=loss, accuracy=correct / max(seen, 1),
                                norm=norm / (step + 1 - last), kl=moved.item() / max(count.item(), 1),
                                per_second=len(batch) / seconds, peak_mib=peak_memory(device)))
            report(bar, name, history[-1], steps, seconds)
        if saving:
            model_state, optimizer_state = get_state_dict(policy, optimizer, options=WHOLE)
            done = dict(model=model_state, step=step + 1)
            if rank == 0:
                save(done if end else done | dict(optimizer=optimizer_state))
        totals.zero_()
        last, clock = step + 1, time.perf_counter()
    bar.close()
    if world > 1:
        dist.barrier()  # what the first process saved is there for all
    return history


def kl(log_probs, base_logits):
    """KL(pi || pi_base) in nats, [...], of log_probs [..., L] from the base with base_logits [..., L]."""
    return (log_probs.exp() * (log_probs - F.log_softmax(base_logits.float(), -1))).sum(-1)


def report(bar, name, row, steps, seconds):
    """One log step: on the progress bar of a terminal, or as a plain line where output is none."""
    text = ("loss {loss:.4f}, accuracy {accuracy:.3f}, norm {norm:.3f}, KL {kl:.3f}, {per_second:.0f}/s, "
            "{peak_mib:.0f} MiB").format(**row)
    bar.set_postfix_str(text)
    if bar.disable:
        left = seconds * (steps - row["step"])
        print(f"{name} {row['step']}/{steps}: {text}, {left:.0f} s left", flush=True)


@torch.no_grad()
def generate(base, rewards, ids, *, length, end=None, pad=None, temperature=0.0, top_p=1.0, generator=None,
             speculative=False, compile=False):
    """Algorithm 2: continues ids [B, T] by `length` tokens, [B, T + length].

    rewards: what is added to the base's log-probabilities, as in `mixture`.
    end: the id that ends a row and fills it from there on. pad [B]: how many places at the left are padding.
    temperature: 0 takes the most likely token, else samples (generator) from the smallest set of tokens that
        has at least top_p of the probability.
    speculative: the first reward drafts tokens with its own distribution, the base and the other rewards
        answer for all of them in one pass, and `accept` keeps those that the result may keep, so that its
        distribution stays that of Algorithm 2. Of EFT's rewards the tuned model drafts.
    compile: torch.compile for the steps after the prompt, with CUDA graphs where there is CUDA: a minute or
        two for each set of models. The models must not be trained on after that.

    A policy has a KV `cache`, `features` and `head`, as models/gpt.py. The device is waited for once in eight
    tokens, or where something drafts, at each draft.
    """
    B, T = ids.shape
    # A few lengths of the cache instead of many, since a compiled step is made for each.
    room = -(-(T + length) // 128) * 128 if compile else T + length
    terms = [(weight, policy, kept_cache(policy, i, B, room, pad) if compile else policy.cache(B, room, pad))
             for i, (weight, policy) in enumerate([(1.0, base), *rewards])]
    if (least := min(cache.length for *_, cache in terms)) < T + length:
        raise ValueError(f"{T} tokens and {length} new ones, but a model has room for {least}: ask for fewer "
                         "(--new-tokens)")
    drafter = terms.pop(1) if speculative and rewards else None

    def run(terms, new, at, n=1):
        """Scores [B, n, L] behind each of the last n of the tokens `new`, whose first has place `at`.

        What the caches hold from there on is forgotten: dropped drafts.
        """
        for *_, cache in terms:
            cache.at = at
        if not compile or not at:  # the prompt comes once
            return scores(terms, new, n)
        torch.compiler.cudagraph_mark_step_begin()  # the scores of the last call are no longer needed
        return compiled(ids.device.type)(terms, new, n, torch.full((1,), at, device=ids.device))

    out, new, known = [ids], ids, T  # `new`: those of the known tokens that the policies have not seen
    k, done = 4, torch.zeros(B, dtype=torch.bool, device=ids.device)
    while known < T + length:
        at = known - new.shape[1]
        if drafter:
            k = min(k, T + length - known - 1)
            weight, policy, cache = drafter
            drafted, q, drafts, last, ended = [], [], [], new, done[:, None]
            while len(drafted) <= k:
                logits = run([(1.0, policy, cache)], last, known + len(drafts) - last.shape[1])  # [B, 1, L]
                drafted.append(weight * logits)
                if end is not None and ended.all():
                    k = len(drafts)  # there is nothing to draft behind the end
                if len(drafts) < k:
                    q.append(probabilities(logits, temperature, top_p))
                    last = draw(q[-1], temperature, generator)  # [B, 1]
                    drafts.append(last)
                    ended = ended | (last == end)
            p = torch.cat(drafted, 1) + run(terms, torch.cat([new, *drafts], 1), at, k + 1)  # [B, k + 1, L]
            new = accept(probabilities(p, temperature, top_p), q, drafts, done, temperature, generator)
            k = min(k + 1, 8) if new.shape[1] > k else max(new.shape[1] - 1, 1)
        else:
            p = run(terms, new, at)  # [B, 1, L], the log-probabilities, up to a constant
            if temperature:
                p = probabilities(p, temperature, top_p)
            new = draw(p, temperature, generator)
        if end is not None:
            ended = new == end
            new = new.masked_fill(done[:, None] | (ended.cumsum(1) > ended), end)
            done |= ended.any(1)
        out.append(new)
        known, new = known + new.shape[1], new[:, -1:]
        if end is not None and (drafter or (known - T) % 8 == 0) and done.all():  # waits for the device
            out.append(new.new_full((B, T + length - known), end))
            break
    return torch.cat(out, 1)


def scores(terms, ids, n, at=None):
    """What (weight, policy, cache) terms say behind the last n of the new ids [B, T], float32 [B, n, L]:

    the sum of weight * logits. at: see models/gpt.py's `features`.
    """
    return sum(weight * policy.head(policy.features(ids, cache, at)[:, -n:]).float()
               for weight, policy, cache in terms)


@functools.cache
def compiled(device_type):
    """`scores` with all its models in one graph.

    On CUDA it is a CUDA graph. On a CPU the weights become constants, packed for the fastest of several
    matrix products.
    """
    torch._dynamo.config.recompile_limit = 64  # each set of models, each weight and each shape is one
    torch._dynamo.config.specialize_float = True  # a weight is a constant, not a tensor on the CPU
    if device_type == "cuda":
        return torch.compile(scores, mode="reduce-overhead")
    config = torch._inductor.config
    config.freezing = config.max_autotune = True
    config.autotune_num_choices_displayed, config.max_autotune_report_choices_stats = 0, False
    return torch.compile(scores)


def kept_cache(policy, i, batch, length, pad):
    """The cache of the i-th policy of a compiled step, the same in every call.

    A CUDA graph is recorded for memory that stays where it is, and changes it there.
    """
    kept = KEPT.setdefault(policy, {})
    if (i, batch, length) not in kept:
        kept[i, batch, length] = policy.cache(batch, length)
        for tensor in (x for pair in kept[i, batch, length].kv for x in pair):
            tensor.zero_()  # a step multiplies by 0 what it masks, and what memory held may be nan
            torch._dynamo.mark_static_address(tensor, guard=False)
    cache = kept[i, batch, length]
    cache.pad = pad
    return cache


def probabilities(logits, temperature, top_p):
    """The distribution [..., L] to sample from: softmax, of which the likeliest share of top_p is kept.

    At temperature 0 it is 1 at the likeliest token.
    """
    if not temperature:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        likeliest, order = p.sort(-1, descending=True)
        likeliest = likeliest * (likeliest.cumsum(-1) - likeliest < top_p)  # those before it have less
        p = torch.zeros_like(p).scatter_(-1, order, likeliest)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, temperature, generator=None):
    """A sample [...] of p [..., L], which need not sum to 1; at temperature 0 its largest entry.

    Of exponentials with the rates p, the i-th is the first to come with probability p_i / sum(p). Unlike
    torch.multinomial this waits for no device.
    """
    if temperature:
        times = torch.empty_like(p).exponential_(generator=generator)
        p = p / times.clamp(min=torch.finfo(p.dtype).tiny)
    return p.argmax(-1)


def accept(p, q, drafts, done, temperature, generator=None):
    """Speculative sampling (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023): tokens [B, n + 1] of p.

    p [B, k + 1, L]: the distributions wanted behind 0..k drafts. q: the k distributions [B, 1, L] that the
    drafts, k of [B, 1], come from. done [B]: rows whose tokens do not matter.

    A draft y is kept with probability min(1, p(y) / q(y)). The first one that is not gives way to a sample
    of max(p - q, 0), normalised, and those behind it are dropped. Behind k kept drafts comes a sample of p.
    All rows take the same number of tokens, the least that any row has, so that their caches stay aligned:
    where a row stops does not depend on the tokens that it drops. Waits for the device.
    """
    k = len(drafts)
    if not k:
        return draw(p, temperature, generator)
    drafts = torch.cat(drafts, 1)  # [B, k]
    q = torch.cat([*q, torch.zeros_like(p[:, :1])], 1)  # [B, k + 1, L]: the last is no draft's
    p_y, q_y = (x[:, :k].gather(-1, drafts[..., None])[..., 0] for x in (p, q))  # [B, k]
    u = torch.rand(drafts.shape, device=p.device, generator=generator)
    kept = (u * q_y < p_y).long().cumprod(1).sum(1)  # [B]
    n = int(kept.masked_fill(done, k).min())
    rest = (p[:, n] - q[:, n]).clamp(min=0)  # [B, L]
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, n])  # p = q, but for rounding
    token = draw(rest, temperature, generator)  # [B]
    if n < k:
        token = torch.where(kept > n, drafts[:, n], token)
    return torch.cat([drafts[:, :n], token[:, None]], 1)


@torch.no_grad()
def score(base, rewards, batches, chunk=512):
    """What the base, with rewards as in `mixture`, makes of known texts: means over all targets as a dict:

    nll and kl (from the base alone) in nats, accuracy of the likeliest token.
    batches: list of (inputs, targets [N]) as `fit` takes them with `head`.
    """
    totals = []
    for inputs, targets in tqdm(batches, desc="score", disable=None, leave=False):
        with torch.autocast("cuda", torch.bfloat16, enabled=targets.is_cuda):
            features = {policy: policy(*inputs).split(chunk) for _, policy in [(1, base), *rewards]}
            for k, y in enumerate(targets.split(chunk)):
                logits = {policy: policy.head(parts[k]) for policy, parts in features.items()}
                log_probs = mixture(base, rewards, logits.get)
                right = log_probs.argmax(-1) == y
                totals.append(torch.stack([F.nll_loss(log_probs, y, reduction="sum"), right.sum(),
                                           kl(log_probs, logits[base]).sum()]))
    n = sum(len(targets) for _, targets in batches)
    return dict(zip(("nll", "accuracy", "kl"), (torch.stack(totals).double().sum(0) / n).tolist()))


class RewardProcessor:
    """A reward inside another library's decoding: a callable (input_ids [B, T], scores [B, L]) -> scores.

    It is a logits processor as transformers' generate takes them, logits_processor=[RewardProcessor(reward)]:
    log-probabilities of the tilted distribution come out. beta: that of test time divided by that of
    training. The reward keeps its own KV cache and looks for the longest prefix that it has seen, so changed
    prefixes, reordered beams and new batches cost time but are right. pad: the id that pads the left of
    prompts of different lengths. size: the tokenizer's, where output matrices differ by padded rows.
    """

    def __init__(self, reward_model, beta=1.0, pad=None, size=None):
        self.model, self.beta, self.pad, self.size = reward_model, beta, pad, size
        self.seen, self.cache = None, None

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        ids, old = input_ids, self.seen
        T = ids.shape[1]
        pad = (ids != self.pad).long().argmax(-1) if self.pad is not None else None
        same = 0
        if old is not None and len(old) == len(ids) and (pad is None or torch.equal(pad, self.cache.pad)):
            n = min(T - 1, old.shape[1])  # the last token is always asked
            same = int((ids[:, :n] == old[:, :n]).all(0).long().cumprod(0).sum())
        if not same or T > self.cache.length:
            self.cache, same = self.model.cache(len(ids), 2 * T + 64, pad), 0
        self.cache.at, self.seen = same, None  # an error on the way leaves nothing to go on from
        logits = self.model.head(self.model.features(ids[:, same:], self.cache)[:, -1])
        self.seen = ids.clone()
        out = torch.full_like(scores, -math.inf, dtype=torch.float32)
        out[:, :self.size] = tilt(scores[:, :self.size], logits[:, :self.size], self.beta)
        return out


@torch.no_grad()
def predict(policy, inputs, batch=256):
    """A frozen policy's logits, float32 [N, L] on its device, for inputs [N, ...]; bf16 autocast on CUDA."""
    device = next(policy.parameters()).device
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        return torch.cat([policy(x.to(device, non_blocking=True)).float()
                          for x in tqdm(inputs.split(batch), desc="predict", disable=None, leave=False)])


def accuracy(scores, labels):
    """Top-1 accuracy in [0, 1] of scores [N, L] for labels [N]."""
    return (scores.argmax(-1).cpu() == labels.cpu()).float().mean().item()


def place(tensor, device):
    """The tensor on the device, where it takes at most half of what is free there; else as it is."""
    fits = device.type == "cpu" or tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return tensor.to(device) if fits else tensor


def frozen_dtype(device):
    """The dtype of weights that do not move: bf16 on CUDA; float32 on a CPU, where bf16 is seldom faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_memory(device):
    """Peak memory in MiB: what CUDA allocated, or else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def arguments(doc):
    """The flags of both training scripts. Those without a default here take it from the scripts' recipes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", help="checkpoint, folder or hub id of the frozen base")
    p.add_argument("--method", choices=("prt", "ft", "pretrain"), help="default: prt")
    p.add_argument("--steps", type=positive(int))
    p.add_argument("--batch", type=positive(int), help="examples a step, on all processes together")
    p.add_argument("--lr", type=positive(float), help="peak learning rate")
    p.add_argument("--warmup", type=int, help="steps of linear warm-up (default: 25%% of them, of text 3%%)")
    p.add_argument("--weight-decay", type=float, help="AdamW's; 0 is the paper's Adam")
    p.add_argument("--beta", type=positive(float), default=1.0, help="unit of the reward (paper: lambda)")
    p.add_argument("--alpha", type=float, default=0.0, help="weight of the reward's entropy (eq. 12)")
    p.add_argument("--accum", type=positive(int), help="micro-batches a step and process")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    p.add_argument("--compile", action="store_true", help="torch.compile the trained network")
    p.add_argument("--resume", action="store_true", help="go on with an unfinished --out")
    return p


def options(args):
    """What `fit` takes from those flags as it stands."""
    names = "method", "lr", "weight_decay", "beta", "alpha", "accum", "seed", "compile"
    return {name: getattr(args, name) for name in names}


def positive(kind):
    """argparse type: a finite number above 0."""
    def number(text):
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return kind(text)
    return number


def setup(device=None):
    """Turns TF32 on, joins torchrun's processes (only the first prints), returns the device to use."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from None
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {device}: use --device cpu, or cuda where torch finds such a device")
    torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def run(main):
    """Calls a script's main(). What a user can mend ends in one line and exit code 2, not in a traceback."""
    try:
        main()
    except (ValueError, OSError, ArithmeticError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
