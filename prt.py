"""Portable Reward Tuning (Chijiwa et al., ICML 2025, arXiv 2502.12776): the method, in one file.

Fine-tuning moves a base distribution towards labelled data. Portable reward tuning keeps what moved it: a network
r(x, y), trained by cross-entropy on

    pi_r(y|x) = pi_base(y|x) exp(r(x, y) / beta) / Z(x)                                            (eq. 5, 6)

while the base stays frozen. The same r is then added to the log-probabilities of any other base with the same labels.

`reward`, `tilt` and `prt_loss` are the maths; `fit` is Algorithm 1. Nothing here knows images, text or files: a policy
is any module that maps inputs to logits [..., L].
"""
import functools
import math
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm


def reward(logits, ref_logits=None, beta=1.0):
    """The reward that a network stands for: beta * (log pi_theta - log pi_ref), float32 [..., L].

    logits, ref_logits: [..., L]. With ref_logits=None the reference is uniform and the reward is beta * logits, the
    paper's portable reward (section 4). With the network's own source base as reference it is the implicit reward of
    fine-tuning, log pi_ft / pi_pt (Prop. 3.1), which EFT moves to another base. A reward is defined only up to a
    constant per x, which `tilt` normalises away: the uniform case leaves out the log-normaliser for that reason.
    """
    if ref_logits is None:
        return beta * logits.float()
    same_labels("reward", logits, "reference", ref_logits)
    return beta * (F.log_softmax(logits.float(), -1) - F.log_softmax(ref_logits.float(), -1))


def tilt(base_logits, r, beta=1.0):
    """Log-probabilities of pi_base * exp(r / beta) / Z, float32 [..., L] (eq. 6; Algorithm 2 with a new base).

    base_logits, r: [..., L]. Raises ValueError where their label counts differ.
    """
    same_labels("base", base_logits, "reward", r)
    return F.log_softmax(base_logits.float() + r.float() / beta, -1)


def prt_loss(base_logits, r, targets, beta=1.0, alpha=0.0, ignore_index=-100):
    """Mean cross-entropy of the tilted distribution (eq. 7) minus alpha * mean entropy of softmax(r) (eq. 12): a scalar.

    base_logits, r: [..., L]; targets: [...] with labels 0..L-1. Both means run over the targets that are not
    ignore_index; where none counts the loss is 0. Its gradient in r is (pi_r - onehot(target)) / beta / count at alpha 0.
    """
    log_probs = tilt(base_logits, r, beta)
    counts = targets != ignore_index
    n = counts.sum().clamp(min=1)
    loss = F.nll_loss(log_probs.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum") / n
    if alpha:
        log_q = F.log_softmax(r.float(), -1)
        entropy = -(log_q.exp() * log_q).sum(-1)  # [...]
        loss = loss - alpha * entropy[counts].sum() / n
    return loss


def same_labels(name, logits, other, other_logits):
    if logits.shape[-1] != other_logits.shape[-1]:
        raise ValueError(f"{name} and {other} must have the same labels: the {name} has {logits.shape[-1]} of them, "
                         f"the {other} {other_logits.shape[-1]}")


def sample(step, n, batch, seed):
    """Indices [batch] of training step `step`: every epoch a fresh permutation of the n examples.

    A pure function of its arguments, so that a resumed run sees the batches it would have seen.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    return torch.cat([permutation(n, seed, e)[places[places // n == e] % n] for e in (places // n).unique().tolist()])


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def learning_rate(step, steps, warmup, decay):
    """Factor on the peak learning rate in step 0..steps-1: linear warm-up, then decay ("cosine" or "linear") to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[decay]


def fit(policy, batches, load, *, steps, base=None, method="prt", beta=1.0, alpha=0.0, lr=1e-5, warmup=0,
        decay="cosine", weight_decay=0.0, clip=1.0, accum=1, seed=0, compile=False, log_every=50, save_every=500,
        save=None, state=None, name="fit"):
    """Algorithm 1: trains `policy` in place so that the base, tilted by the policy's reward, predicts the targets.

    policy: module, policy(*inputs) -> logits [..., L]; its parameters with requires_grad move. Modes are left alone: a
        network given in eval mode keeps its BatchNorm statistics, so a micro-batch's make-up cannot change the result.
    batches: step -> LongTensor [batch] of example indices, a pure function of the step (see `sample`).
    load: (indices [b], generator) -> (inputs, targets [...], base_logits [..., L] or None), on the policy's device.
        Randomness (augmentation) comes from the generator alone. base_logits are the cached answers of the base.
    base: the frozen policy that answers where `load` brings no base_logits; None is the uniform base, for which this is
        plain cross-entropy training from scratch.
    method: "prt" (uniform reference) or "ft" (reference = the base: the tilt gives pi_theta back, plain fine-tuning).
    accum: micro-batches a step and process; their loss is normalised over the targets of all of them, on all processes.
    save: called with {"model", "optimizer", "step"} every save_every steps, and at the end without "optimizer".
    state: what `save` was given, to go on from there; the run then ends in the weights of one never interrupted.

    AdamW in float32 (weight_decay 0 is the paper's Adam), bf16 autocast on CUDA. The device is waited for only where
    something is logged or saved. Returns one dict per log step. Raises FloatingPointError where loss or gradient is
    not finite, before it is saved.
    """
    device = next(policy.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
    start = 0
    if state is not None:
        policy.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    ddp = torch.nn.parallel.DistributedDataParallel(policy) if world > 1 else None
    net = ddp or policy  # what runs; `policy` itself is what is saved and scored
    net = torch.compile(net) if compile else net
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16, enabled=device.type == "cuda")
    history, generator = [], torch.Generator()
    totals, clock, last = torch.zeros(4, device=device), time.perf_counter(), start  # loss, right, targets, gradient norm
    bar = tqdm(total=steps, initial=start, desc=name, disable=rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
    for step in range(start, steps):
        logging = (step + 1) % log_every == 0 or step + 1 == steps
        saving = save and ((step + 1) % save_every == 0 or step + 1 == steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(step, steps, warmup, decay)
        indices = batches(step)
        if len(indices) % (world * accum):
            raise ValueError(f"a batch of {len(indices)} does not split into {accum} micro-batches on {world} processes")
        micro = []
        for i, chunk in list(enumerate(indices.chunk(world * accum)))[rank::world]:
            micro.append(load(chunk, generator.manual_seed((seed * 1_000_003 + step) * 1_009 + i)))
        count = sum((targets >= 0).sum() for _, targets, _ in micro)
        if world > 1:
            dist.all_reduce(count)
        count = count.clamp(min=1)
        for i, (inputs, targets, base_logits) in enumerate(micro):
            if ddp:
                ddp.require_backward_grad_sync = i + 1 == len(micro)
            with autocast():
                logits = net(*inputs)
                # In fine-tuning the base cancels out of the loss: only the KL that is logged needs it.
                if base_logits is None and base is not None and (method == "prt" or logging):
                    with torch.no_grad():
                        base_logits = base(*inputs)
            known = base_logits is not None
            base_logits = base_logits if known else torch.zeros_like(logits)
            r = reward(logits, base_logits if method == "ft" else None, beta)
            share = (targets >= 0).sum() / count
            loss = prt_loss(base_logits, r, targets, beta, alpha) * share
            (loss * world).backward()  # DistributedDataParallel averages the gradients, the share already sums to 1
            with torch.no_grad():
                right = ((base_logits.float() + r / beta).argmax(-1) == targets).sum()
                totals[:3] += torch.stack([loss * count, right, (targets >= 0).sum()])
        totals[3] += torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if logging or saving:
            if world > 1:
                dist.all_reduce(totals)
            loss, right, seen, norm = totals.tolist()  # waits for the device
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"step {step + 1}: loss or gradient is not finite (loss {loss / seen}); stopped "
                                         "before saving, the last checkpoint is kept. Try a lower --lr or longer --warmup")
            now = time.perf_counter()
            row = dict(step=step + 1, loss=loss / max(seen, 1), accuracy=right / max(seen, 1),
                       per_second=len(indices) * (step + 1 - last) / (now - clock), memory_mib=peak_memory(device))
            if known:
                row["kl"] = kl(tilt(base_logits, r.detach(), beta), base_logits)[targets >= 0].mean().item()
            if logging and rank == 0:
                history.append(row)
                report(bar, row, (now - clock) / (step + 1 - last) * (steps - step - 1), steps, name)
            totals.zero_()
        if saving and rank == 0:
            done = dict(model=policy.state_dict(), step=step + 1)
            save(done if step + 1 == steps else done | dict(optimizer=optimizer.state_dict()))
        if logging or saving:
            clock, last = time.perf_counter(), step + 1
    bar.close()
    return history


def kl(log_probs, base_logits):
    """KL(pi || pi_base) in nats, [...], of log_probs [..., L] from the base with base_logits [..., L]."""
    return (log_probs.exp() * (log_probs - F.log_softmax(base_logits.float(), -1))).sum(-1)


@torch.no_grad()
def predict(policy, inputs, batch=256):
    """A frozen policy's logits, float32 [N, L] on its device, for inputs [N, ...] on any; bf16 autocast on CUDA."""
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


def report(bar, row, seconds_left, steps, name):
    """One log step: on the progress bar of a terminal, or as a plain line where output is none."""
    figures = "  ".join(f"{k} {v:.4g}" if k in ("loss", "kl") else f"{k} {v:.3f}" if k == "accuracy" else
                        f"{k} {v:.0f}" for k, v in row.items() if k != "step")
    if bar.disable:
        print(f"{name} {row['step']}/{steps}  {figures}  {seconds_left:.0f} s left", flush=True)
    else:
        bar.set_postfix_str(figures)


def peak_memory(device):
    """Peak memory in MiB: what CUDA allocated, or else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def setup(device=None):
    """Turns TF32 on, joins torchrun's process group where there is one, and returns the device to use."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch finds no CUDA device; use --device cpu")
    torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def run(main):
    """Calls a script's main(). What a user can mend (bad input, a full disk) ends in one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
