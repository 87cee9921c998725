"""What a run of a script needs besides the method: device, processes, batches, checkpoints, and scores."""
import functools
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import prt
from data import files, text
from models import flags, tickets, weights
from models.tokenizer import Tokenizer

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # saved as one process would save it
# Flags that may change when a run is resumed.
MAY_CHANGE = {"resume", "device", "compile", "out"}
# Whether prt.fit is running, the number of the signal that came (0: none), and when it came.
STOP = SimpleNamespace(training=False, signal=0, time=0.0)


def main(script):
    """Calls a script's main(); user errors print one line and exit with code 2, without a traceback."""
    STOP.training, STOP.signal = False, 0
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        script()
    except (ValueError, OSError, ArithmeticError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if STOP.signal else handler)  # lets the exit finish
        if dist.is_initialized():
            dist.destroy_process_group()


def interrupt(number, frame):
    """Handles SIGINT (Ctrl-C) and SIGTERM: prt.fit finishes its step and saves; all else exits at once."""
    # torchrun forwards signals, so that a single Ctrl-C arrives twice, the second time within 3 seconds.
    again = STOP.signal and time.monotonic() - STOP.time > (3 if dist.is_initialized() else 0)
    if again or not STOP.training:
        STOP.signal = number
        sys.stderr.write(f"\nended by {signal.Signals(number).name}\n")
        sys.exit(128 + number)
    if not STOP.signal:
        STOP.signal, STOP.time = number, time.monotonic()
        try:  # os.write, since print raises an error if the signal came in the middle of a print
            os.write(1, b"\nstopping after this step; Ctrl-C again ends at once\n")
        except OSError:  # in `python ... | tee log`, Ctrl-C ended tee, and nothing can be printed
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)


def stopping():
    """Returns whether any process got a signal. All of them call this after the same step, and agree."""
    number = torch.tensor(STOP.signal)  # on the CPU, so that a GPU is not synchronized
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    if number > STOP.signal:
        STOP.signal, STOP.time = number.item(), time.monotonic()
    return bool(number)


# Device and processes

def setup(device=None):
    """Returns the device, enables TF32, and joins torchrun's process group, of which rank 0 prints."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available = ["cuda", *cuda, "cpu"] if cuda else ["cpu"]
    if device and device not in available:
        raise ValueError(f"--device {device}: unavailable; there are the CPU and {len(cuda)} CUDA devices")
    device = torch.device(device or available[0])
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention builds a plan for every new length
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)  # for all that names no device: synchronization, memory statistics
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
    return device


def shard(model, device):
    """Shards a model's weights over the processes with FSDP2, which gathers one block at a time."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Of exactly this type: the parts of a ticket's ParametrizationList, a subclass, are no blocks.
    lists = [module for module in model.modules() if type(module) is torch.nn.ModuleList]
    for module in (*(block for blocks in lists for block in blocks), model):
        fully_shard(module, mesh=mesh)


def frozen_dtype(device):
    """Returns the dtype of frozen weights: bfloat16 on CUDA, float32 on a CPU, as for all else there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def freeze(model, device):
    """Freezes a model in place, its matrices in frozen_dtype, as autocast would cast them, and returns it."""
    for p in model.requires_grad_(False).parameters():
        p.data = p.data.to(frozen_dtype(device)) if p.ndim > 1 else p.data
    return model


def chunk_size(vocab, device):
    """Returns for how many targets prt.fit computes logits at a time.

    512 on a CPU, and on CUDA as many as an eighth of the memory holds. A target takes 32 bytes per token of
    the vocabulary: 2 each for the logits of policy and base in bfloat16, and 4 each for up to 7 values in
    float32, such as r, the tilted logits, their log-softmax, and its gradient. With 80 GB and Qwen2.5's
    151,936 tokens, these are 2,056 targets.
    """
    return 512 if device.type == "cpu" else torch.cuda.mem_get_info(device)[1] // 8 // (32 * vocab)


def to_device(x, device):
    """Returns a tensor, or a tuple of them, on the device.

    Copies to CUDA are made from pinned memory, so that they are asynchronous.
    """
    if isinstance(x, tuple):
        return tuple(to_device(y, device) for y in x)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")


def place(tensor, device):
    """Returns the tensor, moved to the device if it needs less than half of the free memory there."""
    fits = device.type == "cpu" or tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return tensor.to(device) if fits else tensor


# Training

def shuffled(step, n, batch, seed):
    """Returns the indices [batch] of a training step; every epoch is a new permutation of the n examples.

    It depends on its arguments only, so that a resumed run gets the same batches as an uninterrupted one.
    """
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // n
    return torch.cat([permutation(n, seed, e)[positions[epochs == e] % n] for e in epochs.unique().tolist()])


def hold_out(n, share):
    """Returns which of n training examples to train on, and which to hold out: two LongTensors of indices.

    They depend on n and share only, so that eval.py finds the held-out examples again.
    """
    random_order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    held_out = int(share * n)
    return random_order[held_out:].sort().values, random_order[:held_out].sort().values


def order(args, n):
    """Returns the function `indices` of prt.fit: batches of the n examples that are not held out, shuffled.

    Raises ValueError if --hold-out is given, but too small to hold out an example.
    """
    used, held_out = hold_out(n, args.hold_out)
    if args.hold_out and not len(held_out):
        raise ValueError(f"--hold-out {args.hold_out:g} of {n} training examples is less than one: raise it")
    return lambda step: used[shuffled(step, len(used), args.batch, args.seed)]


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def initialize(args, policy, info, state):
    """Does what --reward-init random and --ticket ask for, in place.

    info: entries of the checkpoint. state: the checkpoint to continue from, or None. Raises ValueError if its
    ticket was of other weights.
    """
    if "random" in (args.reward_init, args.ticket):
        torch.manual_seed(args.seed + 1)  # the base may have started from the weights of args.seed
        head = policy.head if info["kind"] == "classifier" else None
        policy.load_state_dict(weights.network(info["kind"], policy.arch, head).state_dict())
    if args.ticket:
        settings = dict(kind=args.ticket, keep=args.keep, freeze=args.freeze, seed=args.seed)
        info["ticket"] = tickets.convert(policy, settings)
        if state and state["ticket"]["checksum"] != info["ticket"]["checksum"]:
            raise ValueError(f"--resume: {args.out} was started with other weights below the mask")
        if info["kind"] == "gpt":
            info["tokenizer"] = Tokenizer(info["tokenizer"], args.base).hash  # the text needs more bytes


def fit_options(args, steps, warmup, policy, base, device, info, state):
    """Returns keyword arguments of prt.fit: values of flags, and base, optimizer, start, stop, and save.

    From here on, a signal waits for the end of a step, as in `interrupt`. Shards policy and base if there is
    more than one process. warmup: default of --warmup, in steps. info: entries of the checkpoint besides
    weights. state: the checkpoint to restore the policy from, or None.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for model in filter(None, (policy, base)):
            shard(model, device)
    group = dict(params=policy.parameters(), initial_lr=args.lr)  # as prt.fit sets it: saved states have it
    optimizer = torch.optim.AdamW([group], lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if state is not None:
        set_state_dict(policy, optimizer, options=FULL_STATE, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the progress bar's MiB are of this run
    STOP.training = True
    names = "method", "beta", "alpha", "accum", "seed", "compile"
    return dict({name: getattr(args, name) for name in names}, base=base, optimizer=optimizer, steps=steps,
                warmup=warmup if args.warmup is None else args.warmup, name=Path(args.out).stem,
                start=state["step"] if state else 0, stop=stopping,
                save=lambda step: save(args, info, policy, optimizer, step, steps))


def settings(args):
    """Returns the arguments that must be the same when a run is resumed; its checkpoint stores them.

    --accum may change with the number of processes, except in pretraining, where CLIP's loss depends on the
    size of the micro-batch.
    """
    free = MAY_CHANGE if args.method == "pretrain" else MAY_CHANGE | {"accum"}
    return {k: v for k, v in vars(args).items() if k not in free}


def begin(args):
    """Returns the checkpoint that a run continues from: None, or with --resume the one at args.out.

    Raises before any work is done if the run would overwrite a file or mix two runs' settings.
    """
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        if path.exists():
            raise FileExistsError(f"{path} exists: continue it with --resume, or choose another --out")
        return None
    if not path.exists():
        raise FileNotFoundError(f"--resume: there is no {path}")
    state = files.read(path, lazy=True)
    if "optimizer" not in state:
        raise ValueError(f"--resume: {path} is not an unfinished run (its last step: {state.get('step')})")
    before = state.get("args", {})
    for k, v in settings(args).items():
        if before.get(k) != v:
            flag = k.replace("_", "-")
            raise ValueError(f"--resume: {path} was started with --{flag} {before.get(k)}, not {v}")
    return state


def save(args, info, policy, optimizer, step, steps):
    """Writes a checkpoint to args.out, with the optimizer's state unless it is the last of the run.

    The last one of a ticket holds its masks instead of weights. Exits the program if a signal came and steps
    are left.
    """
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=FULL_STATE)
    finished, is_ticket = step == steps, "ticket" in info
    if not dist.is_initialized() or dist.get_rank() == 0:
        content = info | dict(args=settings(args), step=step)
        if is_ticket:
            content["ticket"] = info["ticket"] | dict(masks=weights.pack_masks(policy, model_state))
        if not (finished and is_ticket):
            content["model"] = model_state
        if not finished:
            content["optimizer"] = optimizer_state
        files.save(args.out, content, compress=finished and is_ticket)
        if finished:
            tqdm.write(f"{args.out}: {Path(args.out).stat().st_size:,} bytes")
    if dist.is_initialized():
        dist.barrier()  # no process continues before the file exists
    STOP.training = not finished
    if stopping() and not finished:
        tqdm.write(f"{args.out} has {step} of {steps} steps; continue with the same command and --resume")
        sys.exit(128 + STOP.signal)


def launch(args, data, tuning, pretraining, stages, train):
    """Runs a training script: `train` once, or for every stage if no flag says what to train.

    data: the data set of the stages. tuning, pretraining: recipes (flag -> default). stages: name -> recipe,
    whose `base` is an earlier stage. A finished stage is not run again. train: called with the arguments, the
    device, and the checkpoint to continue from, or None.
    """
    if args.method in ("ft", "pretrain") and args.reward_init:
        raise ValueError(f"--reward-init is for rewards, not for --method {args.method}")
    if args.method == "pretrain" and args.ticket:
        raise ValueError("--ticket is for rewards, not for --method pretrain")
    if args.reward_init and args.ticket:
        raise ValueError("--reward-init: a ticket's weights are those that --ticket names; leave it out")
    if args.ticket is None and (args.keep or args.freeze):
        raise ValueError("--keep and --freeze are for tickets: add --ticket random or --ticket base")
    device = setup(args.device)

    def start(run):
        state = begin(run)
        torch.manual_seed(run.seed)
        train(run, device, state)

    if args.data != data or args.method or args.base:
        recipe = pretraining if args.method == "pretrain" else tuning
        if args.ticket:
            recipe = recipe | flags.TICKET
        out = f"out/{Path(args.data).name}-{args.method or 'prt'}.pt"
        return start(flags.resolve(args, recipe | dict(out=out)))
    if args.ticket:
        raise ValueError(f"--ticket needs a --base, such as out/{data}-0/old.pt of the run without arguments")
    folder = Path(args.out or f"out/{data}-{args.seed}")
    for name, stage in stages.items():
        # The recipe fixes the data, method, size, and base; all other flags apply to every stage.
        fixed = {flag: stage[flag] for flag in ("data", "method", "size") if flag in stage}
        if "base" in stage:
            fixed["base"] = f"{folder / stage['base']}.pt"
        if stage["method"] != "prt":
            fixed["reward_init"] = None
        run = flags.resolve(args, stage, **fixed, out=f"{folder / name}.pt")
        checkpoint = files.read(run.out, lazy=True) if Path(run.out).exists() else {}
        if not checkpoint or "optimizer" in checkpoint:
            run.resume = bool(checkpoint)
            start(run)
        elif dict.fromkeys(settings(run)) | checkpoint.get("args", {}) == settings(run):  # older: fewer flags
            print(f"{run.out} is finished and is not trained again")
        else:
            raise ValueError(f"{run.out} was made with other arguments; choose another --out")
    print(f"\npython eval.py --run {folder}")


# Scores

@torch.no_grad()
def predict(policy, inputs, batch=256):
    """Returns a frozen policy's logits, float32 [N, L] on its device, for inputs [N, ...]."""
    device = next(policy.parameters()).device
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        return torch.cat([policy(to_device(x, device)).float()
                          for x in tqdm(inputs.split(batch), desc="predict", disable=None, leave=False)])


def accuracy(scores, labels):
    """Returns the top-1 accuracy in [0, 1] of scores [N, L] for labels [N]."""
    return (scores.argmax(-1).cpu() == labels.cpu()).float().mean().item()


def score_texts(base, rewards, batches, chunk=512):
    """Returns a dict of means over all targets: nll and kl (from the base) in nats, and accuracy in [0, 1].

    base, rewards: as in prt.mixture. batches: list of (inputs, targets [N]), as for prt.fit with a head.
    """
    means = score_targets(base, rewards, batches, chunk).double().mean(0)
    return dict(zip(("nll", "accuracy", "kl"), means.tolist()))


@torch.no_grad()
def score_targets(base, rewards, batches, chunk=512):
    """Returns negative log-likelihood, whether it is the most likely token, and KL of each target, [N, 3]."""
    scores, device = [], next(base.parameters()).device
    for batch in tqdm(batches, desc="score", disable=None, leave=False):
        inputs, targets = to_device(batch, device)
        with torch.autocast("cuda", torch.bfloat16, enabled=targets.is_cuda):
            features = {policy: policy(*inputs).split(chunk) for policy in {base, *(p for _, p in rewards)}}
            for k, y in enumerate(targets.split(chunk)):
                logits = {policy: policy.head(parts[k]) for policy, parts in features.items()}
                log_probs = prt.mixture(base, rewards, logits.get)
                scores.append(torch.stack([F.nll_loss(log_probs, y, reduction="none"),
                                           log_probs.argmax(-1) == y, prt.kl(log_probs, logits[base])], -1))
    return torch.cat(scores)


def score_examples(base, rewards, data, batch):
    """Returns what score_targets does for each of N examples, text.Tokens: a list of [targets, 3] on the CPU.

    batch: batch size, in batches of similar lengths.
    """
    parts = text.by_length(data.ids, batch)
    scores = score_targets(base, rewards, [text.collate(data, torch.tensor(part)) for part in parts])
    order = [i for part in parts for i in part]
    scores = dict(zip(order, scores.cpu().split([int(data.counts[i][1:].sum()) for i in order])))
    return [scores[i] for i in range(len(order))]
