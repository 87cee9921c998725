"""Measures tickets (models/tickets.py): accuracy against bytes, for classification alone and for rewards.

python tests/measure/tickets.py classification --picture tickets.png    classifies the embedded images
python tests/measure/tickets.py shapes --seeds 0 1 2                    rewards on images, out/shapes-SEED
python tests/measure/tickets.py arithmetic --seeds 0 1 2                rewards on text, out/arithmetic-SEED

The last two need old.pt, new.pt, and reward.pt there, which the training scripts make without arguments
(--seed SEED). They train the other rewards with the commands in REWARDS, if they are not there yet, and run
eval.py. Bytes are those of the files. Standard deviations are over the seeds.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import figures

import prt
from data import files, images
from models import clip, pretrain, runs, scores, ticket_files, tickets

TEXT = "--batch 64 --accum 1 --steps 900"
# Data set -> name of a reward -> flags of the training script.
REWARDS = dict(
    shapes=dict(reward_1800="--batch 128 --steps 1800 --lr 3e-3",
                random_init="--batch 128 --steps 1800 --lr 3e-3 --reward-init random",
                ticket_base="--batch 128 --steps 900 --ticket base --freeze 0.6",
                ticket_random="--batch 128 --steps 1800 --ticket random"),
    arithmetic=dict(random_init=f"{TEXT} --lr 3e-3 --reward-init random",
                    random_init_decay=f"{TEXT} --lr 3e-3 --weight-decay 1 --reward-init random",
                    ticket_base=f"{TEXT} --ticket base --freeze 0.1",
                    ticket_random=f"{TEXT} --ticket random --freeze 0.1"))
SCRIPTS = dict(shapes="train_vision.py", arithmetic="train_lm.py")
FREEZE, KEEP = (0.3, 0.5, 0.7, 0.9), (0.1, 0.3, 0.7)
COLORS = ("black", "#cc3311", "#0077bb", "#009988")  # of the lines in the picture


# Classification alone: one network for the 64 classes of the embedded images, with a uniform base

def randomly_pruned(n, settings):
    """Replaces tickets.counts: all frozen weights are pruned, and the share `keep` of the others is kept."""
    searched = n - round(settings["freeze"] * n)
    return 0, searched, round(settings["keep"] * searched)


def network(seed, classes):
    """Returns the tiny CLIP's image tower, untrained, with a random head."""
    torch.manual_seed(seed)
    arch, info = pretrain.TINY, dict(kind="classifier")
    model = clip.network(info, arch, torch.empty(classes, arch["embed_dim"]))
    tickets.randomize(model, 1.0, torch.Generator().manual_seed(seed))  # for its head
    return clip.network(info, arch, model.head)


def classify(seed, steps, folder, keep=None, freeze=0.0):
    """Trains a ticket, or without `keep` the weights; returns its test accuracy and the bytes of its file."""
    train, test = (images.load("shapes", split, 32) for split in ("train", "test"))
    model, info = network(seed, len(train.classes)), dict(kind="classifier", arch=pretrain.TINY)
    if keep:
        info["ticket"] = tickets.convert(model, dict(kind="random", keep=keep, freeze=freeze, seed=seed))
    group = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(group, lr=1e-2 if keep else 3e-3, weight_decay=0.0, fused=True)
    prt.fit(model, lambda step: runs.shuffled(step, len(train.labels), 128, seed),
            lambda i, generator: ((train.images[i],), train.labels[i], None), steps=steps,
            warmup=steps // 4, optimizer=optimizer, seed=seed, log_every=steps, name=f"{keep} {freeze}")
    path = Path(folder) / "classifier.pt"
    if keep:
        ticket_files.save(path, info, model, model.state_dict())
    else:
        files.save(path, info | dict(model=model.state_dict()))
    return scores.accuracy(scores.predict(model, test.images), test.labels), path.stat().st_size


def classification(args):
    """Prints the table of classification, and draws the picture."""
    def mean(name, **settings):
        scores, sizes = zip(*(classify(seed, args.steps, args.out, **settings) for seed in args.seeds))
        print(f"{name:40} {statistics.mean(sizes):9,.0f} bytes  {spread(scores)}", flush=True)
        return statistics.mean(sizes), statistics.mean(scores)

    lines = {"trained weights": [mean("trained weights, float32")]}
    whole = mean("ticket, keep 0.5", keep=0.5)
    lines["frozen (keep 0.5)"] = [whole, *(mean(f"ticket, keep 0.5, freeze {f}", keep=0.5, freeze=f)
                                           for f in FREEZE)]
    with mock.patch.object(tickets, "counts", randomly_pruned):
        lines["randomly pruned"] = [whole, *(mean(f"randomly pruned {f}, keep 0.5", keep=0.5, freeze=f)
                                             for f in FREEZE)]
    lines["other densities"] = [mean(f"ticket, keep {k}", keep=k) for k in KEEP]
    if args.picture:
        lines = [(name, color, points, None) for (name, points), color in zip(lines.items(), COLORS)]
        figures.save(figures.chart(lines, range(3, 7)), args.picture)


def spread(values):
    """Returns "mean +- standard deviation" in percent; no deviation of a single value."""
    deviation = f" +- {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{deviation}"


# Rewards: what each adds to the new base, and how many bytes must be sent for it

def rewards(args):
    """Trains the rewards that are missing, and prints the mean accuracy of each on the new base."""
    script, column = SCRIPTS[args.what], dict(shapes="top1", arithmetic="exact")[args.what]
    tables = []
    for seed in args.seeds:
        folder = Path(args.out) / f"{args.what}-{seed}"
        for name, text in REWARDS[args.what].items():
            if not (folder / f"{name}.pt").exists():
                call(script, "--source", folder / "old.pt", "--seed", seed, *text.split(),
                     "--out", folder / f"{name}.pt")
        full = files.read(folder / "reward.pt")
        half = {name: x.bfloat16() for name, x in full["model"].items()}
        files.save(folder / "reward_bfloat16.pt", full | dict(model=half))
        names = ["reward", "reward_bfloat16", *REWARDS[args.what]]
        paths = [folder / f"{name}.pt" for name in names]
        call("eval.py", "--reward", *paths, "--base", folder / "new.pt", "--source", folder / "old.pt",
             "--json", folder / "tickets.json", *(["--new-tokens", 16] if column == "exact" else []))
        rows = json.loads((folder / "tickets.json").read_text())["rows"]
        tables.append([(name, path.stat().st_size, row[column])
                       for name, path, row in zip(names, paths, rows[1:])])
    for rows in zip(*tables):
        size, scores = statistics.mean(size for _, size, _ in rows), [score for _, _, score in rows]
        first = statistics.mean(size for (_, size, _), *_ in tables)
        print(f"{rows[0][0]:20} {size:9,.0f} bytes ({first / size:5.1f} times smaller)  {spread(scores)}  "
              + ", ".join(f"{score:.1%}" for score in scores))


def call(script, *arguments):
    subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True)


def parse():
    """Returns the command line's arguments."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("classification", *REWARDS))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    p.add_argument("--steps", type=int, default=900, help="classification: training steps (default: 900)")
    p.add_argument("--out", default="out", help="folder of the runs (default: out)")
    p.add_argument("--picture", help="classification: .png of accuracy over bytes")
    return p.parse_args()


def main():
    args = parse()
    (classification if args.what == "classification" else rewards)(args)


if __name__ == "__main__":
    runs.main(main)
