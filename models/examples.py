"""The two built-in examples: what `python train_vision.py` and `python train_lm.py` run without flags."""
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from data import files
from models import flags, weights

START = 5  # seconds that any stage takes to load and score
EVAL = Path(__file__).parents[1] / "eval.py"


class Stage(NamedTuple):
    """A run of the training script."""

    name: str  # of its checkpoint in the example's folder
    seconds: int  # on two cores of an Intel Xeon; only the ratios matter once a stage has run
    flags: str


class Example(NamedTuple):
    data: str
    stages: list
    table_seconds: int  # of eval.py


VISION = Example("shapes", [
    Stage("old", 20, "--method pretrain --size tiny --steps 600 --lr 1e-3"),
    Stage("new", 90, "--method pretrain --size small --steps 1200"),
    Stage("reward", 20, "--source {folder}/old.pt --steps 900 --lr 3e-3"),
    Stage("tuned_source", 20, "--source {folder}/old.pt --steps 900 --lr 3e-3 --method ft"),
    Stage("tuned_base", 50, "--source {folder}/new.pt --steps 900 --lr 3e-3 --method ft")], table_seconds=10)
# Weight decay removes facts from the reward: those that the base knows get no gradient, and decay.
TUNE = "--source {folder}/old.pt --steps 900 --batch 64 --accum 1 --lr 3e-3 --weight-decay 1"
TEXT = Example("arithmetic", [
    Stage("old", 60, "--data arithmetic-old --method pretrain --size old --steps 500"),
    Stage("new", 120, "--data arithmetic-new --method pretrain --size new --steps 1000"),
    Stage("reward", 30, TUNE),
    Stage("tuned_source", 30, TUNE + " --method ft"),
    Stage("tuned_base", 20, "--source {folder}/new.pt --steps 300 --batch 64 --accum 1 --lr 3e-4 --method ft")
    ], table_seconds=30)


def run(example, args, device, parse, train):
    """Runs the stages that are not finished, and then eval.py on the folder, as a program of its own.

    args: the flags that are given; they apply to every stage. parse, train: those of the training script.
    Raises ValueError if a finished stage had other flags. Exits with eval.py's code if that is not 0.
    """
    folder = Path(args.out or f"out/{example.data}-{args.seed or 0}")
    todo = unfinished(example, folder, args, parse)
    reference = [seconds for _, _, seconds in todo] + [example.table_seconds]
    if folder.is_file():
        raise ValueError(f"--out {folder}: a file, but a run without other flags makes a folder")
    begin, total = time.perf_counter(), len(example.stages)
    made = [f"{folder / stage.name}.pt" for stage in example.stages]
    for _, run_args, _ in todo:
        flags.check_run(run_args, made)
    for i, (number, run_args, _) in enumerate(todo):
        speed = (time.perf_counter() - begin) / sum(reference[:i]) if i else 1.0
        minutes = speed * sum(reference[i:]) / 60
        print(f"\nrun {number} of {total}: {run_args.out}; about {minutes:.1f} minutes for all that is left")
        with weights.run(run_args, made) as state:
            train(run_args, device, state)
    command = [sys.executable, str(EVAL), "--run", str(folder)]
    command += ["--device", args.device] if args.device else []
    print(f"\npython eval.py --run {folder}", flush=True)
    if not dist.is_initialized() or dist.get_rank() == 0:
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        if code := subprocess.run(command, env=alone).returncode:
            sys.exit(code)


def unfinished(example, folder, args, parse):
    """Returns (number, arguments, estimated seconds) of the stages of an example that are not finished."""
    todo = []
    for number, stage in enumerate(example.stages, 1):
        stage_args = parse([word.format(folder=folder) for word in stage.flags.split()])
        run_args = flags.filled(vars(stage_args), args)
        run_args.data, run_args.out = stage_args.data, f"{folder / stage.name}.pt"
        if stage_args.method != "prt":
            run_args.reward_init = None
        found = files.read(run_args.out) if Path(run_args.out).exists() else None
        run_args.resume = found is not None and "optimizer" in found
        if found is None or run_args.resume:
            size = (run_args.steps or 1) * run_args.batch / (stage_args.steps * stage_args.batch)
            todo.append((number, run_args, START + stage.seconds * size))
        elif found.get("args") == weights.settings(run_args):
            print(f"{run_args.out} is finished and is not trained again")
        else:
            raise ValueError(f"{run_args.out} was made with other arguments, or by an earlier version; "
                             "choose another --out")
    return todo
