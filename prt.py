"""Portable Reward Tuning (Chijiwa et al., ICML 2025, arXiv 2502.12776) in one file.

Fine-tuning moves a base distribution toward labeled data. Portable reward tuning trains a separate network
for this, the reward r(x, y) of a label y for an input x, with cross-entropy on

    pi_r(y|x) = pi_base(y|x) exp(r(x, y) / beta) / Z(x)                                        (eq. 5, 6)

while the base stays frozen. Z(x) normalizes. At test time the same r / beta is added to the log-probabilities
of any other base with the same labels, without further training.

`reward`, `tilt`, and `prt_loss` are the math, `fit` is Algorithm 1, and `generate` is Algorithm 2. Nothing
here depends on images or files: a policy is any module that maps inputs to logits [..., L] for L labels.
"""
import math
import time
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

IGNORED = -100  # the label of targets to ignore, as in F.cross_entropy


def reward(logits, ref_logits=None, beta=1.0):
    """Returns the reward of a network, beta * (log pi_theta - log pi_ref), float32 [..., L].

    logits, ref_logits: [..., L], those of pi_theta and pi_ref. Raises ValueError if L differs. Without
    ref_logits, pi_ref is uniform and the result is beta * logits: the paper's portable reward (Algorithm 1).
    If pi_ref is the base that was fine-tuned, it is the implicit reward (Prop. 3.1), which emulated
    fine-tuning (EFT) adds to another base. Added to the same base, it restores the tuned model:

    >>> old, tuned = torch.tensor([[0.50, 0.25, 0.25], [0.20, 0.60, 0.20]]).log()
    >>> tilt(old, reward(tuned, old)).exp()  # EFT
    tensor([0.2000, 0.6000, 0.2000])
    >>> tilt(old, reward(tuned)).exp()  # PRT: 0.10, 0.15, and 0.05, divided by their sum
    tensor([0.3333, 0.5000, 0.1667])
    """
    if ref_logits is None:
        return beta * logits.float()
    check_labels(network=logits, reference=ref_logits)
    return beta * (F.log_softmax(logits.float(), -1) - F.log_softmax(ref_logits.float(), -1))


def tilt(base_logits, r, beta=1.0):
    """Returns the log-probabilities of pi_base * exp(r / beta) / Z, float32 [..., L] (eq. 6, Algorithm 2).

    base_logits, r: [..., L]. Raises ValueError if L differs. Z normalizes, so that a constant added to r
    changes nothing. The last example is PRT before training, a copy of the base as the reward: pi_base^2 / Z.

    >>> base, r = torch.tensor([[0.7, 0.2, 0.1], [1.0, 4.0, 1.0]]).log()
    >>> tilt(base, r).exp()  # 0.7, 0.2 * 4, and 0.1, divided by their sum
    tensor([0.4375, 0.5000, 0.0625])
    >>> torch.allclose(tilt(base, r + 5), tilt(base, r))
    True
    >>> tilt(base, reward(base)).exp()  # 0.49, 0.04, and 0.01, divided by their sum
    tensor([0.9074, 0.0741, 0.0185])
    """
    check_labels(base=base_logits, reward=r)
    return F.log_softmax(base_logits.float() + r.float() / beta, -1)


def prt_loss(base_logits, r, targets, beta=1.0, alpha=0.0, ignore_index=IGNORED, reduction="mean"):
    """Returns the cross-entropy of `tilt` (eq. 7) minus alpha * entropy of softmax(r) (eq. 12), a scalar.

    base_logits, r: [..., L]. targets [...]: labels 0 to L-1, or ignore_index. reduction: "mean" or "sum" over
    the targets that are not ignore_index; either is 0 if there are none. With "sum" and alpha=0, the gradient
    with respect to r is (pi_r - onehot) / beta:

    >>> r = torch.zeros(3, requires_grad=True)
    >>> prt_loss(torch.tensor([0.7, 0.2, 0.1]).log(), r, torch.tensor(1)).backward()
    >>> r.grad
    tensor([ 0.7000, -0.8000,  0.1000])
    """
    log_probs = tilt(base_logits, r, beta).reshape(-1, r.shape[-1])  # [N, L]
    loss = F.nll_loss(log_probs, targets.reshape(-1), ignore_index=ignore_index, reduction="sum")
    counted = targets != ignore_index
    if alpha:
        entropy = torch.special.entr(r.float().softmax(-1)).sum(-1)  # [...]
        loss = loss - alpha * (entropy * counted).sum()
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: there are mean and sum")
    return loss if reduction == "sum" else loss / counted.sum().clamp(min=1)


def mixture(base, rewards, logits):
    """Returns the log-probabilities of a base tilted by any number of rewards, float32 [..., L].

    rewards: list of (weight, policy). weight * logits(policy) is added to logits(base). [] is the base alone,
    [(beta_train / beta, reward)] is PRT, [(1, tuned), (-1, old)] is EFT. logits: policy -> logits [..., L].
    """
    return F.log_softmax(sum((w * logits(policy).float() for w, policy in rewards), logits(base).float()), -1)


def kl(log_probs, base_logits):
    """Returns KL(pi || pi_base) in nats, [...], for log_probs of pi and base_logits, both [..., L]."""
    return (log_probs.exp() * (log_probs - F.log_softmax(base_logits.float(), -1))).sum(-1)


def check_labels(**logits):
    """Raises ValueError if two tensors [..., L], passed as name=tensor, differ in their number of labels."""
    (name, n), (other_name, other_n) = ((name, x.shape[-1]) for name, x in logits.items())
    if n != other_n:
        raise ValueError(f"the {name} has {n} labels and the {other_name} {other_n}: they must be the same")


def label_loss(base_logits, r, targets, beta, alpha):
    """Returns the sum of `prt_loss` over targets, and how many of them are the tilt's most likely label."""
    correct = ((base_logits + r / beta).argmax(-1) == targets).sum()
    return prt_loss(base_logits, r, targets, beta, alpha, reduction="sum"), correct


def fit(policy, indices, fetch, *, steps, base=None, method="prt", beta=1.0, alpha=0.0, loss=label_loss,
        optimizer=None, warmup=0, decay="cosine", clip=1.0, accum=1, seed=0, head=None, chunk=512,
        compile=False, log_every=50, start=0, save=None, save_every=None, stop=lambda: False, name="fit"):
    """Algorithm 1: trains `policy` in place so that the base, tilted by its reward, predicts the targets.

    policy: module, policy(*inputs) -> logits [N, L]. Its train or eval mode is left as it is.
    indices: deterministic function from a step to a LongTensor [batch] of example indices.
    fetch: function (indices [b] of a micro-batch, generator) -> (inputs, targets [N], the base's output if it
        is cached, else None), on the policy's device. All its random numbers must come from the generator.
    base: the frozen base. None: fetch returns its output, or the base is uniform (plain cross-entropy).
    method: "prt" (pi_ref of `reward` is uniform), or "ft" (pi_ref is the base): plain fine-tuning.
    loss: function (base_logits, r, targets, beta, alpha) -> (sum of the losses, number of correct targets).
        `fit` divides by the number of targets that are not IGNORED in the batch, over all processes.
    optimizer: its learning rates are the peaks. Default: AdamW, learning rate 1e-5, no weight decay (Adam).
    head: if given, policy and base return features [N, D], and head(policy, features) -> logits [N, L] is
        called for at most `chunk` targets at a time.
    warmup, decay: as in `schedule`. clip: maximum gradient norm. accum: micro-batches per step and process.
    start: the number of finished steps, if policy and optimizer come from a checkpoint.
    save: called with the number of finished steps, every save_every steps (default: steps // 4) and last.
    stop: called after every step. If it returns True, on all processes, `fit` saves and returns.

    On CUDA the forward passes run in bfloat16 autocast. The device is synchronized only to log or save.
    Returns a list of dicts, one per log step. Raises FloatingPointError if loss or norm is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > 1 and not isinstance(policy, FSDPModule):
        raise ValueError("more than one process, but the policy is not sharded: call fully_shard on it first")
    optimizer = optimizer or torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    network, base_network = (torch.compile(m) if m and compile else m for m in (policy, base))
    if head is None:
        head, chunk = (lambda policy, logits: logits), 2**62  # above any N, so that there is one chunk
    zero = torch.zeros((), device=next(policy.parameters()).device)  # every logit of a uniform base
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=zero.is_cuda)
    # The cross-entropy of fine-tuning does not depend on the base, which then runs only for the logged KL.
    base_cancels = method == "ft" and loss is label_loss and not alpha
    history, totals, logged, clock = [], Counter(), start, time.perf_counter()
    bar = tqdm(range(start, steps), desc=name, total=steps, initial=start, disable=True if rank else None)
    for step in bar:
        saving = save and (step + 1 == steps or (step + 1) % (save_every or max(1, steps // 4)) == 0)
        logging = saving or step + 1 == steps or (step + 1) % log_every == 0
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(step, steps, warmup, decay)
        batch = indices(step)
        if len(batch) % (accum * world):
            raise ValueError(f"a batch of {len(batch)} does not split into {accum} x {world} (processes)")
        parts, first = batch.chunk(accum * world), (seed * 1_000_003 + step) * 1_009  # part i: seed first + i
        micro_batches = [fetch(parts[i], torch.Generator().manual_seed(first + i))
                         for i in range(rank, len(parts), world)]
        count = sum(counted(targets).sum() for _, targets, _ in micro_batches)
        if world > 1:
            dist.all_reduce(count)
        count = count.clamp(min=1)
        for inputs, targets, base_features in micro_batches:
            with autocast:
                features = network(*inputs)
                if base_features is None and base is not None and (logging or not base_cancels):
                    with torch.no_grad():
                        base_features = base_network(*inputs)
            # Backward runs through one chunk's logits at a time, and then once through the network.
            leaves = [part.detach().requires_grad_() for part in features.split(chunk)]
            base_parts = [None] * len(leaves) if base_features is None else base_features.split(chunk)
            with torch.autocast("cuda", enabled=False):  # an outer context keeps autocast's casts cached
                for leaf, base_part, y in zip(leaves, base_parts, targets.split(chunk)):
                    with autocast:
                        logits = head(policy, leaf)
                        base_logits = zero.expand_as(logits) if base_part is None else head(base, base_part)
                        r = reward(logits, base_logits if method == "ft" else None, beta)  # r(x, y)
                        loss_sum, correct = loss(base_logits, r, y, beta, alpha)  # -log pi_r(y|x)
                    (loss_sum * world / count).backward()  # times world: FSDP averages over the processes
                    totals.update(loss=loss_sum.detach(), correct=correct, targets=counted(y).sum())
                    if logging:
                        divergence = kl(tilt(base_logits, r.detach(), beta), base_logits) * counted(y)
                        totals.update(kl=divergence.sum() / count)
            del logits, base_logits, r, loss_sum  # their memory is needed below
            features.backward(torch.cat([leaf.grad for leaf in leaves]))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        stopping = stop()
        if logging or stopping:
            totals.update(norm=(norm.full_tensor() if world > 1 else norm) / world)
            seconds = (time.perf_counter() - clock) / (step + 1 - logged)
            history.append(log(bar, name, totals, step + 1, len(batch), seconds))
            if saving or (save and stopping):
                save(step + 1)
            totals, logged, clock = Counter(), step + 1, time.perf_counter()
        if stopping:
            break
    return history


def schedule(step, steps, warmup, decay):
    """Returns a factor for the peak learning rate: linear `warmup`, then "cosine" or "linear" decay to 0."""
    if not 0 <= warmup < steps:
        raise ValueError(f"a warmup of {warmup} steps does not fit into {steps} steps; change --warmup")
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress


def counted(targets):
    """Returns which of N targets, [N] or [N, ...], have an entry that is not IGNORED, bool [N]."""
    return (targets != IGNORED) if targets.ndim == 1 else (targets != IGNORED).flatten(1).any(-1)


def log(bar, name, totals, step, batch, seconds):
    """Shows and returns the statistics since the last log step. Synchronizes the device.

    totals: sums by name. seconds: time per step. Raises FloatingPointError if loss or norm is not finite.
    """
    values = torch.stack([total.double() for total in totals.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
    sums = dict(zip(totals, values.tolist()))
    n, norm, divergence = max(sums["targets"], 1), sums["norm"], sums.get("kl", math.nan)  # nan: not measured
    loss, accuracy, rate = sums["loss"] / n, sums["correct"] / n, batch / seconds
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; the checkpoint is "
                                 "not changed. Start again with another --out and a lower --lr")
    text = f"loss {loss:.4f}, accuracy {accuracy:.3f}, norm {norm:.3f}, KL {divergence:.3f}, {rate:.0f}/s"
    if values.is_cuda:
        text += f", {torch.cuda.max_memory_allocated(values.device) / 2**20:.0f} MiB"
    bar.set_postfix_str(text)
    if bar.disable:
        print(f"{name} {step}/{bar.total}: {text}, {(bar.total - step) * seconds:.0f} s left", flush=True)
    return dict(step=step, loss=loss, accuracy=accuracy, norm=norm, kl=divergence, per_second=rate)


@torch.no_grad()
def generate(base, rewards, ids, *, length, end=None, pad=None, draw=lambda log_probs: log_probs.argmax(-1)):
    """Algorithm 2: returns ids [B, T] followed by `length` new tokens, [B, T + length].

    base, rewards: as in `mixture`. A policy has the methods `cache`, `features`, and `head` of models/gpt.py.
    end: the id that ends a row and fills the rest of it. pad [B]: how many positions on the left are padding.
    draw: function from log-probabilities [B, 1, V] to tokens [B, 1]. Default: the most likely token.
    """
    B, T = ids.shape
    caches = {policy: policy.cache(B, T + length, pad) for _, policy in [(1.0, base), *rewards]}
    new, ended = ids, torch.zeros(B, 1, dtype=torch.bool, device=ids.device)
    for step in range(length):
        logits = {policy: policy.head(policy.features(new, kv)[:, -1:]) for policy, kv in caches.items()}
        new = draw(mixture(base, rewards, logits.get))  # [B, 1]
        if end is not None:
            new = new.masked_fill(ended, end)
            ended |= new == end
        ids = torch.cat([ids, new], 1)
        if end is not None and step % 8 == 7 and ended.all():  # synchronizes the device: every 8th step only
            break
    return F.pad(ids, (0, T + length - ids.shape[1]), value=end)


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
        r = reward(self.model.head(features), beta=self.trained_beta)
        self.seen = input_ids.clone()
        out = torch.full_like(scores, -math.inf, dtype=torch.float32)
        out[:, :self.size] = tilt(scores[:, :self.size], r[:, :self.size], self.beta)
        return out

    def shared_prefix(self, ids, pad):
        """Returns how many leading tokens of ids [B, T] are already in the cache, at most T - 1."""
        if self.seen is None or len(self.seen) != len(ids) or not (pad is None or pad.equal(self.cache.pad)):
            return 0
        n = min(ids.shape[1] - 1, self.seen.shape[1])
        return int((ids[:, :n] == self.seen[:, :n]).all(0).long().cumprod(0).sum())
