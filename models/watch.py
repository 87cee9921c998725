"""What is written down and said about a run: its log in OUT.jsonl, held-out scores, and what looks wrong.

The first line of a log has the run's arguments, the versions, the device, and what begin() is given. A line
for each log step has the dict of prt.log, lr, and seconds; one for each save, with --hold-out, step and
held_out, the scores of which the first one counts.
"""
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import files
from models import runs, weights


def check(args):
    """Raises FileExistsError, before a new run begins, if it would replace what is no log or a checkpoint."""
    path = Path(f"{args.out}.jsonl")
    if path.exists() and not files.read_bytes(path).startswith(b'{"args": '):
        raise FileExistsError(f"{path} exists, and is not the log of a run: choose another --out")
    if args.hold_out:
        from models import held_out  # an optional file
        held_out.check(args)


def begin(args, info, model, optimizer, state, steps, said, score=None):
    """Returns the rows of a run's log, which grow, and the arguments of prt.fit that save, log, and stop.

    info: entries of the checkpoints. state: the one that the run continues from, or None. said: dict, what
    the log and the line before training say of the data. score: function -> dict of held-out scores, or None.
    """
    start = weights.restore(args, model, optimizer, state, steps)
    log, device, clock = Path(f"{args.out}.jsonl"), next(model.parameters()).device, time.perf_counter()
    said |= dict(steps=steps, batch=args.batch, device=runs.name_of(device))
    rows, before, ends = [dict(args=vars(args), **said, **runs.origin())], 0.0, []
    if start and log.exists():
        with files.explain(f"{log} is damaged; without it the run begins a new one", *files.DAMAGE):
            lines = files.read_text(log).split("\n")[:-1]  # without one that was cut off
            rows = [row for row in map(files.parse_json, lines) if row.get("step", 0) <= start] or rows
            before = max(row.get("seconds", 0.0) for row in rows)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        files.write_lines(log, rows)
    print("training: " + ", ".join(f"{name} {value}" for name, value in said.items()))
    if steps < 50:
        epochs = " or --epochs" if hasattr(args, "epochs") else ""
        print(f"{steps} steps are few: raise --steps{epochs}, or lower --batch")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # prt.log shows the peak

    def add(row):
        rows.append(row)
        try:
            with open(log if writes else os.devnull, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:  # training goes on
            tqdm.write(f"{log}: a line is lost: {error}")

    def record(row):
        seconds = before + time.perf_counter() - clock
        add(row | dict(lr=optimizer.param_groups[0]["lr"], seconds=round(seconds, 1)))

    def stop():
        ends.append(time.perf_counter())
        minutes = (ends[-1] - ends[0]) / 3 * (steps - start) / 60
        if len(ends) == 4 and minutes > 1 and device.type == "cpu":  # a GPU would have to be waited for
            tqdm.write(f"about {minutes:.0f} minutes")
        return runs.stopping()

    def save(step, args=args, steps=steps):
        weights.save(args, info, model, optimizer, step, steps)

    if score:
        from models import held_out  # an optional file
        save = held_out.scoring(args, save, add, rows, score)
    return rows, dict(start=start, stop=stop, record=record, save=save, name=Path(args.out).stem)


def end(args, rows, step, steps):
    """Ends the program if training was stopped; otherwise says which save was best, and what looks wrong.

    rows: of the log. step, steps: how many were made, and are to be made.
    """
    runs.after_training(args.out, step, steps)
    losses = [row["loss"] for row in rows if "loss" in row]
    if steps >= 50 and losses and losses[-1] > losses[0]:
        print(f"the loss rose from {losses[0]:.4f} to {losses[-1]:.4f}: lower --lr, or raise --batch")
    if any("held_out" in row for row in rows):
        from models import held_out
        held_out.report(args, rows, steps)


def compare(args, before, after):
    """Says so if a model has a lower score on the test split than its source."""
    if after < before:
        more = "; or --weight-decay 1, or --reward-init head" if hasattr(args, "epochs") else ""
        print(f"{args.out} scores below its source: train longer, or with another --lr{more}")
