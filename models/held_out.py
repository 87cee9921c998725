"""Scores on held-out examples in a run's log (--hold-out), and the checkpoint with the best (--keep-best)."""
import argparse
from pathlib import Path

from tqdm import tqdm

from models import runs


def best_file(out):
    """Returns the path for the checkpoint with the best held-out score."""
    return Path(f"{str(out).removesuffix('.pt')}.best.pt")


def check(args):
    """Raises FileExistsError, before a new run begins, if that file exists."""
    if args.keep_best and best_file(args.out).exists():
        raise FileExistsError(f"{best_file(args.out)} exists: choose another --out")


def scoring(args, save, add, rows, score):
    """Returns a `save` of prt.fit that also adds a line to the log, with the dict of scores of score().

    save: function (step, args, number of steps). add, rows: of the log. A run that is stopped is not scored,
    since that may take longer than it is given.
    """
    def save_and_score(step):
        save(step)
        if not runs.STOP.stopping:  # on which all processes agree
            row = dict(step=step, held_out=score())
            if args.keep_best and best([*rows, row]) is row:
                out = argparse.Namespace(**vars(args) | dict(out=str(best_file(args.out))))
                save(step, out, steps=step)  # as the last of a run, without the optimizer's state
            add(row)
            tqdm.write(f"held out, after step {step}: {listed(row)}")
    return save_and_score


def best(rows):
    """Returns the row of a log with the best held-out score: the lowest nll, or the highest of another."""
    def goodness(row):
        name, value = next(iter(row["held_out"].items()))  # the first one counts
        return -value if name == "nll" else value
    return max((row for row in rows if "held_out" in row), key=goodness)


def report(args, rows, steps):
    """Prints which save was the best."""
    top = best(rows)
    kept = f", kept in {best_file(args.out)}" if args.keep_best else ""
    print(f"best on held-out examples: step {top['step']} of {steps}, {listed(top)}{kept}")


def listed(row):
    return ", ".join(f"{key} {value:.4f}" for key, value in row["held_out"].items())
