"""Portable Reward Tuning (Chijiwa et al., ICML 2025, arXiv 2502.12776) in one file.

Fine-tuning moves a base distribution toward labeled data. Portable reward tuning trains a separate network,
the reward model, to give a reward r(x, y) to every label y of an input x, with cross-entropy on

    pi_r(y|x) = pi_base(y|x) exp(r(x, y) / beta) / Z(x)                                        (eq. 5, 6)

while the base stays frozen. Z(x) normalizes. At test time the same r / beta is added to the log-probabilities
of any other base with the same labels, without further training. `reward`, `tilt`, and `prt_loss` are the
math, `fit` is Algorithm 1, `generate` Algorithm 2. A model maps inputs to logits [..., L] of L labels.
"""
import contextlib
import math
import time
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm


def reward(logits, ref_logits=None, beta=1.0):
    """Returns the reward of a network, beta * (log pi_theta - log pi_ref), float32 [..., L].

    logits, ref_logits: [..., L], those of pi_theta and pi_ref. Raises ValueError if L differs. Without
    ref_logits, pi_ref is uniform and the result is beta * logits: the paper's portable reward (Algorithm 1).
    If pi_ref is the base that was fine-tuned, it is the implicit reward (Prop. 3.1), which emulated
    fine-tuning (EFT) adds to another base. Added to the same base, it restores the tuned model:
    >>> source, tuned = torch.tensor([[0.50, 0.25, 0.25], [0.20, 0.60, 0.20]]).log()
    >>> tilt(source, reward(tuned, source)).exp()  # EFT
    tensor([0.2000, 0.6000, 0.2000])
    >>> tilt(source, reward(tuned)).exp()  # PRT: 0.10, 0.15, and 0.05, divided by their sum
    tensor([0.3333, 0.5000, 0.1667])
    """
    if ref_logits is None:
        return beta * logits.float()
    n, ref_n = logits.shape[-1], ref_logits.shape[-1]
    check(n == ref_n, f"the network has {n} labels and the reference {ref_n}: they must be the same")
    return beta * (F.log_softmax(logits.float(), -1) - F.log_softmax(ref_logits.float(), -1))


def tilt(base_logits, r, beta=1.0):
    """Returns the log-probabilities of pi_base * exp(r / beta) / Z, float32 [..., L] (eq. 6, Algorithm 2).

    base_logits, r: [..., L]. Raises ValueError if L differs. Z normalizes, so that a constant added to r
    changes nothing. The last example is PRT before training, with a copy of the base: pi_base^2 / Z.
    >>> base, r = torch.tensor([[0.7, 0.2, 0.1], [1.0, 4.0, 1.0]]).log()
    >>> tilt(base, r).exp()  # 0.7, 0.2 * 4, and 0.1, divided by their sum
    tensor([0.4375, 0.5000, 0.0625])
    >>> torch.allclose(tilt(base, r + 5), tilt(base, r))
    True
    >>> tilt(base, reward(base)).exp()  # 0.49, 0.04, and 0.01, divided by their sum
    tensor([0.9074, 0.0741, 0.0185])
    """
    n, r_n = base_logits.shape[-1], r.shape[-1]
    check(n == r_n, f"the base has {n} labels and the reward {r_n}: they must be the same")
    return F.log_softmax(base_logits.float() + r.float() / beta, -1)


def prt_loss(base_logits, r, targets, beta=1.0, alpha=0.0, reduction="mean"):
    """Returns the cross-entropy of `tilt` (eq. 7) minus alpha * entropy of softmax(r) (eq. 12), a scalar.

    base_logits, r: [..., L]. targets [...]: labels 0 to L-1. reduction: "mean" or "sum" over the targets.
    With one target and alpha = 0, the gradient with respect to r is (pi_r - onehot) / beta:
    >>> r = torch.zeros(3, requires_grad=True)
    >>> prt_loss(torch.tensor([0.7, 0.2, 0.1]).log(), r, torch.tensor(1)).backward()
    >>> r.grad
    tensor([ 0.7000, -0.8000,  0.1000])
    """
    log_probs = tilt(base_logits, r, beta).reshape(-1, r.shape[-1])  # [N, L]
    loss = F.nll_loss(log_probs, targets.reshape(-1), reduction=reduction)
    if alpha:
        entropy = torch.special.entr(r.float().softmax(-1)).sum(-1)  # [...]
        loss = loss - alpha * (entropy.mean() if reduction == "mean" else entropy.sum())
    return loss


def combine(base, rewards, logits):
    """Returns the log-probabilities of a base tilted by any number of rewards, float32 [..., L].

    rewards: list of (weight, model), which add weight * logits(model). [] is the base alone, [(beta_train /
    beta, reward model)] is PRT, [(1, tuned source), (-1, source)] is EFT. logits: model -> logits [..., L].
    base.keep(its logits, their sum with the rewards), if there is one, returns what to take as the sum.
    """
    base_logits = logits(base).float()
    tilted = sum((w * logits(model).float() for w, model in rewards), base_logits)
    return F.log_softmax(base.keep(base_logits, tilted) if rewards and hasattr(base, "keep") else tilted, -1)


def kl(log_probs, base_logits):
    """Returns KL(pi || pi_base) in nats, [...], for log_probs of pi and base_logits, both [..., L]."""
    return (log_probs.exp() * (log_probs - F.log_softmax(base_logits.float(), -1))).sum(-1)


def check(fits, message):
    """Raises ValueError with a message if something does not fit."""
    if not fits:
        raise ValueError(message)


def label_loss(base_logits, r, targets, beta, alpha):
    """Returns the sum of `prt_loss` over targets, and how many of them are the tilt's most likely label."""
    loss = prt_loss(base_logits, r, targets, beta, alpha, reduction="sum")
    return loss, ((base_logits + r / beta).argmax(-1) == targets).sum()


def fit(model, indices, fetch, *, steps, base=None, method="prt", beta=1.0, alpha=0.0, loss=label_loss,
        optimizer=None, warmup=0, decay="cosine", clip=1.0, accum=1, seed=0, start=0, head=None, chunk=None,
        log_every=50, record=lambda row: None, save=None, save_every=None, stop=lambda: False, name="fit"):
    """Algorithm 1: trains `model` in place so that the base, tilted by its reward, predicts the targets.

    model: model(*inputs) -> logits [N, L], on CUDA in bfloat16 autocast. Its train or eval mode stays.
    indices: deterministic function from a step to a LongTensor [batch] of example indices.
    fetch: function (indices [b] of a micro-batch, generator) -> (inputs, targets [N], the base's output if it
        is cached, else None), on the model's device. All its random numbers must come from the generator.
    base: the frozen base, a module. None: `fetch` returns its logits, or it is uniform (plain cross-entropy).
    method: "prt" (pi_ref of `reward` is uniform), or "ft" (pi_ref is the base): plain fine-tuning.
    loss: function (base_logits, r, targets, beta, alpha) -> (sum, not mean, of the losses, number correct).
    optimizer: its learning rates at the call are the peaks. Default: AdamW, 1e-5, no weight decay (Adam).
    head: None, or function (model or base, its features [n, D]) -> logits [n, L] of n <= `chunk` targets.
    warmup, decay: as in `schedule`. clip: maximum gradient norm. accum: micro-batches per step and process.
    start: the number of finished steps, if model and optimizer come from a checkpoint (with the peak rates).
    save: called with the number of finished steps, every save_every steps (default: steps // 4) and last.
    stop: called after every step. If it returns True, on all processes, `fit` saves and returns.
    record: called with each dict of `log`, a list of which is returned. Raises FloatingPointError as `log`.
    >>> x, y = torch.randn(80, 8), torch.arange(80) % 4
    >>> source, model, new_base = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    >>> fetch = lambda i, generator: ((x[i],), y[i], None)
    >>> history = fit(model, lambda step: torch.arange(16) + step % 5 * 16, fetch, steps=10, base=source)
    >>> log_probs = tilt(new_base(x), reward(model(x)))  # no training with the new base
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_call(model, indices, fetch, base, method, optimizer, decay, world)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).is_cuda)
    cancels = method == "ft" and loss is label_loss and not alpha  # the base, which need not run then
    head = head or (lambda model, logits: logits)
    history, totals, logged, clock = [], Counter(), start, time.perf_counter()
    bar = tqdm(range(start, steps), desc=name, total=steps, initial=start, disable=True if rank else None)
    for step in bar:
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule(step, steps, warmup, decay)
        batch = indices(step)
        micro_batches, count = fetch_micro_batches(batch, fetch, accum, rank, world, seed, step)
        for i, (inputs, targets, base_features) in enumerate(micro_batches, 1):
            if world > 1:  # the processes add up their gradients once a step
                model.set_requires_gradient_sync(i == len(micro_batches))
            with autocast:
                if base_features is None and base is not None and not cancels:
                    with torch.no_grad():
                        base_features = base(*inputs)
                features = model(*inputs)  # the logits, unless there is a head
            with in_chunks(features, base_features, targets, chunk) as chunks:
                for part, base_part, y in chunks:
                    with autocast:
                        logits = head(model, part)
                        with torch.no_grad():
                            uniform = logits.new_zeros(()).expand_as(logits)
                            base_logits = uniform if base_part is None else head(base, base_part)
                        r = reward(logits, base_logits if method == "ft" else None, beta)  # r(x, y)
                        loss_sum, correct = loss(base_logits, r, y, beta, alpha)  # -log pi_r(y|x)
                    (loss_sum * world / count).backward()  # times world: FSDP averages over the processes
                    totals.update(loss=loss_sum.detach(), correct=correct, targets=len(y))
                    if base_part is not None:
                        some, r = base_logits[:64], r[:64].detach()  # on text, all take a tenth of a step
                        totals.update(kl=kl(tilt(some, r, beta), some).sum(), kl_targets=len(some))
                del logits, uniform, base_logits, r, loss_sum  # frees memory for backward through the network
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        totals.update(norm=norm.full_tensor() / world if world > 1 else norm)  # `log` adds them up
        optimizer.step()
        optimizer.zero_grad()
        stopping, last = stop(), step + 1 == steps
        saving = save and (stopping or last or (step + 1) % (save_every or max(1, steps // 4)) == 0)
        if saving or stopping or last or (step + 1) % log_every == 0:
            history.append(log(bar, name, totals, logged, step + 1, len(batch), clock))
            record(history[-1])
            if saving:
                save(step + 1)
            totals, logged, clock = Counter(), step + 1, time.perf_counter()
        if stopping:
            break
    for group, peak in zip(optimizer.param_groups, peaks):
        group["lr"] = peak
    return history


def check_call(model, indices, fetch, base, method, optimizer, decay, world):
    """Raises ValueError for arguments with which `fit` would train nothing, or something else."""
    check(method in ("prt", "ft") and decay in ("cosine", "linear"), f"unknown {method=} or {decay=}")
    check(callable(indices) and callable(fetch), "indices and fetch must be functions: see fit's docstring")
    check(world == 1 or isinstance(model, FSDPModule), "model is not sharded over processes: fully_shard it")
    groups = optimizer.param_groups if optimizer else [dict(params=[*model.parameters()])]
    trained = {p for group in groups for p in group["params"] if p.requires_grad} & {*model.parameters()}
    check(trained, "no weight of model requires grad and is in optimizer: see model.requires_grad_()")
    if base is not None:
        check(isinstance(base, torch.nn.Module), f"base is a {type(base).__name__}, but must be a module")
        check(trained.isdisjoint(base.parameters()), "base has weights that are trained: copy.deepcopy it")
        norms = [m for m in base.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        check(not any(m.training for m in norms), "base has BatchNorm in train mode: call base.eval()")


def fetch_micro_batches(batch, fetch, accum, rank, world, seed, step):
    """Returns what `fetch` gives for each micro-batch of this process, and the number of all targets.

    batch: indices [B], in accum * world micro-batches; these and their random numbers depend on that only.
    """
    check(torch.is_tensor(batch) and batch.ndim == 1 and not batch.is_floating_point(),
          f"indices returned a {type(batch).__name__}, but must return a LongTensor [batch]")
    check(len(batch) % (accum * world) == 0,
          f"a batch of {len(batch)} does not split into {accum} x {world} (processes)")
    parts, first_seed = batch.chunk(accum * world), (seed * 1_000_003 + step) * 1_009
    micro_batches = [fetch(parts[i], torch.Generator().manual_seed(first_seed + i))
                     for i in range(rank, len(parts), world)]
    check(all(isinstance(x, tuple) and len(x) == 3 and torch.is_tensor(x[1]) for x in micro_batches),
          "fetch must return inputs (a tuple), targets (a tensor), and the base's output or None")
    count = sum(len(targets) for _, targets, _ in micro_batches)
    if world > 1:
        count = torch.tensor(count, device=micro_batches[0][1].device)
        dist.all_reduce(count)
    return micro_batches, count


@contextlib.contextmanager
def in_chunks(features, base_features, targets, size):
    """Yields (features, base features, targets) in parts of `size` rows, and at its end runs backward.

    Each part of the features is detached: backward from its loss stops there, and frees its logits. At the
    end, the gradients of all parts go through the network, once. base_features: or None. size: None for one.
    """
    check(torch.is_tensor(features), f"the model returned {type(features).__name__}, not a tensor of logits")
    size = size or len(features)
    parts = [part.detach().requires_grad_() for part in features.split(size)]
    base_parts = [None] * len(parts) if base_features is None else base_features.split(size)
    # Leaving the outermost autocast drops its casts of weights: in here, the parts share those of the head.
    with torch.autocast("cuda", enabled=False):
        yield zip(parts, base_parts, targets.split(size), strict=True)
    features.backward(torch.cat([part.grad for part in parts]))


def schedule(step, steps, warmup, decay):
    """Returns a factor for the peak learning rate: linear `warmup`, then "cosine" or "linear" decay to 0."""
    check(0 <= warmup < steps, f"a warmup of {warmup} steps does not fit into {steps} steps")
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress


def log(bar, name, totals, logged, step, batch, clock):
    """Shows and returns the means over the steps since the last log step. Synchronizes the device.

    totals: sums by name since step `logged`, which ended at `clock`. The dict has step; loss, accuracy, kl
    from the base (or None) per target; norm; per_second. Raises FloatingPointError if one is not finite.
    """
    values = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=totals["norm"].device)
                          for x in totals.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
    sums, steps = dict(zip(totals, values.tolist())), step - logged
    seconds = (time.perf_counter() - clock) / steps
    loss, accuracy = sums["loss"] / sums["targets"], sums["correct"] / sums["targets"]
    norm, divergence = sums["norm"] / steps, sums["kl"] / sums["kl_targets"] if "kl" in sums else None
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"steps {logged + 1} to {step}: loss {loss:.4g}, gradient norm {norm:.4g}; "
                                 "nothing was saved since. Start again with a lower learning rate")
    text = f"loss {loss:.4f}, accuracy {accuracy:.3f}, norm {norm:.3f}, "
    text += "" if divergence is None else f"KL {divergence:.3f}, "
    text += f"{batch / seconds:.0f}/s (steps {logged + 1}-{step})"
    text += f", {torch.cuda.max_memory_allocated(values.device) / 2**20:.0f} MiB" if values.is_cuda else ""
    bar.set_postfix_str(text)
    if bar.disable:
        print(f"{name} {step}/{bar.total}: {text}, {(bar.total - step) * seconds:.0f} s left", flush=True)
    return dict(step=step, loss=loss, accuracy=accuracy, norm=norm, kl=divergence, per_second=batch / seconds)


@torch.no_grad()
def generate(base, rewards, ids, *, length, end=None, pad=None, draw=lambda log_probs: log_probs.argmax(-1)):
    """Algorithm 2: returns ids [B, T] followed by `length` new tokens, [B, T + length].

    base, rewards: as in `combine`. A model has the methods `cache`, `features`, and `head` of models/gpt.py.
    end: the id, or the list of ids, that ends a row; the first fills the rest. pad [B]: padding on the left.
    draw: function from log-probabilities [B, 1, V] to tokens [B, 1]. Default: the most likely token.
    """
    (B, T), end = ids.shape, [end] if isinstance(end, int) else end
    caches = {model: model.cache(B, T + length, pad) for _, model in [(1.0, base), *rewards]}
    new, ended = ids, torch.zeros(B, 1, dtype=torch.bool, device=ids.device)
    for step in range(length):
        logits = {model: model.head(model.features(new, kv)[:, -1:]) for model, kv in caches.items()}
        new = draw(combine(base, rewards, logits.get))  # [B, 1]
        if end is not None:
            new = new.masked_fill(ended, end[0])
            ended |= sum(new == i for i in end) > 0
        ids = torch.cat([ids, new], 1)
        if end is not None and step % 8 == 7 and ended.all():  # synchronizes the device: every 8th step only
            break
    return F.pad(ids, (0, T + length - ids.shape[1]), value=end and end[0])
