"""Chooses the recipe of the image example on training pictures that are held out.

python tests/measure/recipes.py out/shapes-0

The folder is that of `python train_vision.py`, of which the two bases are used. Protocol: each pair of steps
and learning rate trains a reward and a tuned source with the old base, and tunes the new base, on 80% of the
training pictures (--hold-out 0.2). Chosen is the pair with the highest mean of three accuracies on the other
20%: base + reward, base + EFT, base fine-tuned. The test pictures are not looked at. Two cores: 7 minutes.
"""
import contextlib
import io
import itertools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import prt
import train_vision
from data import images
from models import flags, runs, scores, weights
from models.clip import classifier

STEPS, RATES, SHARE = (300, 600, 900), ("3e-4", "1e-3", "3e-3"), 0.2


def accuracies(folder, steps, rate, data):
    """Returns the accuracies of base + reward, base + EFT, and the fine-tuned base on held-out pictures."""
    held_out = runs.hold_out(len(data.labels), SHARE)[1]
    prompts, logits = images.prompts(data.classes, data.templates), {}
    runs_of = dict(reward=("old", "prt"), tuned_source=("old", "ft"), tuned_base=("new", "ft"))
    with tempfile.TemporaryDirectory() as place:
        for name, (base, method) in runs_of.items():
            options = ["--data", "shapes", "--source", f"{folder}/{base}.pt", "--method", method,
                       "--lr", rate, "--steps", str(steps), "--hold-out", str(SHARE),
                       "--out", f"{place}/{name}.pt"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train_vision.train(train_vision.parse(options), torch.device("cpu"), None)
            logits[name] = scores.predict(weights.load(f"{place}/{name}.pt"), data.images[held_out])
    for name in ("old", "new"):
        base = classifier(weights.load(f"{folder}/{name}.pt"), prompts)
        logits[name] = scores.predict(base, data.images[held_out])
    rows = [("new", [(1.0, "reward")]), ("new", [(1.0, "tuned_source"), (-1.0, "old")]), ("tuned_base", [])]
    return [scores.accuracy(prt.combine(base, rewards, logits.get), data.labels[held_out])
            for base, rewards in rows]


def main():
    p = flags.parser(__doc__)
    p.add_argument("folder")
    folder, data = p.parse_args().folder, images.load("shapes", "train", 32)
    print("| steps | lr | base + reward | base + EFT | base fine-tuned | mean |\n|---|---|---|---|---|---|")
    for steps, rate in itertools.product(STEPS, RATES):
        found = accuracies(folder, steps, rate, data)
        cells = " | ".join(f"{x:.1%}" for x in (*found, sum(found) / len(found)))
        print(f"| {steps} | {rate} | {cells} |", flush=True)


if __name__ == "__main__":
    runs.main(main)
