"""What a run of a script needs besides the method: device, processes, batches, checkpoints, and scores."""
import functools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import prt
from data import files
from models import flags

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # saved as one process would save it
# Flags that may change when a run is resumed.
MAY_CHANGE = {"resume", "device", "compile", "out"}


def main(script):
    """Calls a script's main(); user errors print one line and exit with code 2, without a traceback."""
    try:
        script()
    except (ValueError, OSError, ArithmeticError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# Device and processes

def setup(device=None):
    """Returns the device, enables TF32, and joins torchrun's process group, in which only rank 0 prints."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from None
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {device}: unavailable; use --device cpu, or cuda with a CUDA device")
    torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
    return device


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(model, device):
    """Shards a model's weights over the processes with FSDP2, which gathers one block at a time."""
    mesh = init_device_mesh(device.type, (processes(),))
    for blocks in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def frozen_dtype(device):
    """Returns the dtype of frozen weights: bfloat16 on CUDA, float32 on a CPU (as fast there)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


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


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def fit_options(args, steps, warmup, policy, base, device, info, state):
    """Returns keyword arguments of prt.fit: values of flags, and base, optimizer, start, and save.

    Shards policy and base if there is more than one process. warmup: default of --warmup, in steps. info:
    entries of the checkpoint besides weights. state: the checkpoint to restore the policy from, or None.
    """
    if processes() > 1:
        for model in filter(None, (policy, base)):
            shard(model, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = args.lr  # prt.fit sets it too, but a state to restore has it already
    if state is not None:
        set_state_dict(policy, optimizer, options=FULL_STATE, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
    names = "method", "beta", "alpha", "accum", "seed", "compile"
    return dict({name: getattr(args, name) for name in names}, base=base, optimizer=optimizer, steps=steps,
                warmup=warmup if args.warmup is None else args.warmup, name=Path(args.out).stem,
                start=state["step"] if state else 0,
                save=lambda step: save(args, info, policy, optimizer, step, last=step == steps))


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
    state = files.read(path)
    if "optimizer" not in state:
        raise ValueError(f"--resume: {path} is not an unfinished run (its last step: {state.get('step')})")
    before = state.get("args", {})
    for k, v in settings(args).items():
        if before.get(k) != v:
            flag = k.replace("_", "-")
            raise ValueError(f"--resume: {path} was started with --{flag} {before.get(k)}, not {v}")
    return state


def save(args, info, policy, optimizer, step, last):
    """Writes a checkpoint to args.out, with the optimizer's state unless it is the last of the run."""
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=FULL_STATE)
    unfinished = {} if last else dict(optimizer=optimizer_state)
    if not dist.is_initialized() or dist.get_rank() == 0:
        files.save(args.out, info | dict(args=settings(args), model=model_state, step=step) | unfinished)
    if dist.is_initialized():
        dist.barrier()  # no process continues before the file exists


def launch(args, data, recipe, stages, train):
    """Runs a training script: train(arguments) once, or for every stage if no flag says what to train.

    recipe: flag -> default. data: the data set of the stages. stages: name -> recipe, whose `base` is an
    earlier stage. A finished stage is not run again.
    """
    if args.data != data or args.method or args.base:
        out = f"out/{Path(args.data).name}-{args.method or 'prt'}.pt"
        return train(flags.resolve(args, recipe | dict(out=out)))
    folder = Path(args.out or f"out/{data}-{args.seed}")
    for name, stage in stages.items():
        # The recipe fixes the data, method, size, and base; all other flags apply to every stage.
        fixed = {flag: stage[flag] for flag in ("data", "method", "size") if flag in stage}
        if "base" in stage:
            fixed["base"] = f"{folder / stage['base']}.pt"
        run = flags.resolve(args, stage, **fixed, out=f"{folder / name}.pt")
        checkpoint = files.read(run.out) if Path(run.out).exists() else {}
        if not checkpoint or "optimizer" in checkpoint:
            run.resume = bool(checkpoint)
            train(run)
        elif checkpoint.get("args") == settings(run):
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
        return torch.cat([policy(x.to(device, non_blocking=True)).float()
                          for x in tqdm(inputs.split(batch), desc="predict", disable=None, leave=False)])


def accuracy(scores, labels):
    """Returns the top-1 accuracy in [0, 1] of scores [N, L] for labels [N]."""
    return (scores.argmax(-1).cpu() == labels.cpu()).float().mean().item()


@torch.no_grad()
def score_texts(base, rewards, batches, chunk=512):
    """Returns a dict of means over all targets: nll and kl (from the base) in nats, and accuracy in [0, 1].

    base, rewards: as in prt.mixture. batches: list of (inputs, targets [N]), as for prt.fit with a head.
    """
    totals = []
    for inputs, targets in tqdm(batches, desc="score", disable=None, leave=False):
        with torch.autocast("cuda", torch.bfloat16, enabled=targets.is_cuda):
            features = {policy: policy(*inputs).split(chunk) for _, policy in [(1, base), *rewards]}
            for k, y in enumerate(targets.split(chunk)):
                logits = {policy: policy.head(parts[k]) for policy, parts in features.items()}
                log_probs = prt.mixture(base, rewards, logits.get)
                correct = log_probs.argmax(-1) == y
                totals.append(torch.stack([F.nll_loss(log_probs, y, reduction="sum"), correct.sum(),
                                           prt.kl(log_probs, logits[base]).sum()]))
    n = sum(len(targets) for _, targets in batches)
    return dict(zip(("nll", "accuracy", "kl"), (torch.stack(totals).double().sum(0) / n).tolist()))
