"""Where should a reward on text start? With what of the source, and what does each start bring to a new base?

python tests/measure/starts.py choose out      chooses each row's recipe, on facts that are set apart for it
python tests/measure/starts.py test out        trains with the chosen recipes, and scores on the test problems
python tests/measure/starts.py table out       prints both as tables

out: the folder of `python train_lm.py --seed 0`, and of the seeds 1 and 2, whose bases are used. All results
are kept in out/starts.jsonl; what is there is not run again. Two processes run at once, one thread each.

Protocol, written down before any figure of the test problems was seen. Rows: a reward that starts as a copy
of the source with the searched recipe (weight decay 1), as a copy without weight decay (the paper's), as the
copied body with a new output matrix, and from random weights; beside them EFT and the fine-tuned new base.
Sizes: the first 200, 1,000, or all 4,000 tuning problems. Facts: a fifth of those that the old base lacks is
set apart; problems about it choose, and the test problems about the other facts are the test. Chosen for each
row and size: learning rate, steps, and for EFT weight decay, by exact match of 500 problems, with the bases of
seed 0 and one order of batches; the standard deviation of a new output matrix is chosen once, by its mean
over the sizes. Test: the bases of seeds 0, 1, 2, and three other orders of batches each (--seed 11, 12, 13).
The goal: the new output matrix, without weight decay, is at least as good as the searched recipe for every
size, and above 85% for every seed at 4,000.
"""
import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_lm
from data import arithmetic, text
from data.tokenizer import Tokenizer
from eval import Row
from models import answers, gpt, weights

SIZES, SEEDS, ORDERS, ORDER = (200, 1000, 4000), (0, 1, 2), (11, 12, 13), 10
BATCH = "--data arithmetic --batch 64 --accum 1"
# Row -> flags, and the learning rates, standard deviations of the output matrix, and weight decays to try.
ROWS = {
    "copy, weight decay 1": ("", ["3e-3"], [None], ["1"]),
    "copy (the paper)": ("", ["1e-3", "3e-3"], [None], ["0"]),
    "head": ("--reward-init head", ["1e-3", "3e-3"], [0.1, 0.3, 1.0], ["0"]),
    "random": ("--reward-init random", ["1e-3", "3e-3"], [None], ["0"]),
    "EFT": ("--method ft", ["1e-3", "3e-3"], [None], ["0", "1"]),
    "new base fine-tuned": ("--method ft", ["3e-4", "1e-3"], [None], ["0"])}
STEPS = 300, 900


def problems(part):
    """Returns the problems, (name, segments), that choose a recipe or test it; part: "choose" or "test"."""
    with mock.patch.dict(arithmetic.COUNTS, test=1000 if part == "test" else 4000):
        found = text.load("arithmetic", "test")[1]
    return [x for x in found if set_apart(x) == (part == "choose")][:500 if part == "choose" else None]


def set_apart(example):
    """Returns whether a problem is about a fact of the fifth that chooses."""
    a, sign, b, _, c, *_ = example[1][1][0].split()  # " 7 - 3 = 4 #### 4"
    a, b = (a, b) if sign == "-" else sorted((int(a), int(b)))
    return random.Random(f"{a} {sign} {b} = {c}").random() < 0.2


def cells(size):
    """Yields the cells to choose from; of a new output matrix, the learning rate is tried with one of them."""
    for row, (_, rates, scales, decays) in ROWS.items():
        for rate, scale, decay, steps in itertools.product(rates, scales, decays, STEPS):
            if not ((scale in (0.1, 1.0) and rate != "1e-3") or (row == "EFT" and (rate, decay) == ("1e-3", "1"))
                    or (row == "copy (the paper)" and steps == 300)):
                yield dict(part="choose", row=row, size=size, rate=rate, scale=scale, decay=decay, steps=steps,
                           seed=0, order=ORDER)


def run(folder, cell):
    """Returns the cell with the exact match of one training run."""
    torch.set_num_threads(1)
    old, new = (f"{folder}/arithmetic-{cell['seed']}/{name}.pt" for name in ("old", "new"))
    source = new if cell["row"] == "new base fine-tuned" else old
    with tempfile.TemporaryDirectory() as place, mock.patch.dict(arithmetic.COUNTS, train=cell["size"]), \
            mock.patch.object(gpt, "HEAD_STD", cell["scale"]), contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        path = f"{place}/model.pt"
        flags = [*f"{BATCH} {ROWS[cell['row']][0]}".split(), "--source", source, "--lr", cell["rate"], "--steps",
                 str(cell["steps"]), "--weight-decay", cell["decay"], "--seed", str(cell["order"]), "--out", path]
        train_lm.train(train_lm.parse(flags), torch.device("cpu"), None)
        model, base, frozen = (weights.load(name) for name in (path, new, old))
    row = Row("", None, base, [(1.0, model)], base)
    if cell["row"] == "EFT":
        row = row._replace(rewards=[(1.0, model), (-1.0, frozen)])
    if cell["row"] == "new base fine-tuned":
        row = row._replace(base=model, rewards=[])
    tokenizer, end = Tokenizer(base.info["tokenizer"], new), base.arch["end"]
    examples = problems(cell["part"])
    prompts = [text.token_ids(parts[:-1], tokenizer, end)[0] for _, parts in examples]
    truth = [answers.final_number(parts[-1][0]) for _, parts in examples]
    written = answers.generate(row, prompts, answers.Decoding(new_tokens=16), end, 256)
    return cell | dict(exact=answers.exact_match(truth, written, tokenizer)["exact"])


def chosen(results):
    """Returns (row, size) -> the cell with the best exact match, with one scale for all sizes."""
    best = {}
    for row in ROWS:
        tried = [x for x in results if x["part"] == "choose" and x["row"] == row]
        top = {(size, scale): max((x for x in tried if (x["size"], x["scale"]) == (size, scale)),
                                  key=lambda x: x["exact"]) for size in SIZES for scale in ROWS[row][2]}
        scale = max(ROWS[row][2], key=lambda s: sum(top[size, s]["exact"] for size in SIZES))
        best |= {(row, size): top[size, scale] for size in SIZES}
    return best


def table(results):
    """Prints what was tried and chosen, and the means over the runs of the test, with the lowest."""
    best = chosen(results)
    print("| row | tuning problems | lr, weight decay, steps, std | held-out facts |\n|---|---|---|---|")
    for x in sorted(results, key=lambda x: ([*ROWS].index(x["row"]), x["size"])):
        if x["part"] == "choose":
            mark = "**" if x == best[x["row"], x["size"]] else ""
            print(f"| {x['row']} | {x['size']} | {x['rate']}, {x['decay']}, {x['steps']}, {x['scale'] or '-'} | "
                  f"{mark}{x['exact']:.1%}{mark} |")
    print(f"\n| row | {' | '.join(f'{size} problems' for size in SIZES)} | by seed at {SIZES[-1]} |")
    print("|---" * (len(SIZES) + 2) + "|")
    for row in ROWS:
        found = {(x["size"], x["seed"], x["order"]): x["exact"] for x in results
                 if x["part"] == "test" and x["row"] == row}
        runs = [[x for (size, *_), x in found.items() if size == wanted] for wanted in SIZES]
        by_seed = [[x for (size, s, _), x in found.items() if (size, s) == (SIZES[-1], seed)] for seed in SEEDS]
        cell = [f"{statistics.mean(r):.1%} ({min(r):.1%} to {max(r):.1%})" if r else "-" for r in runs]
        print(f"| {row} | {' | '.join(cell)} | {', '.join(f'{statistics.mean(s):.1%}' for s in by_seed if s)} |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=("choose", "test", "table"))
    p.add_argument("folder")
    args = p.parse_args()
    path = Path(args.folder, "starts.jsonl")
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if args.part == "table":
        return table(results)
    if args.part == "choose":
        todo = [cell for size in SIZES for cell in cells(size)]
    else:
        todo = [x | dict(part="test", seed=seed, order=order) for order, seed in itertools.product(ORDERS, SEEDS)
                for x in chosen(results).values()]
    done = [{k: v for k, v in x.items() if k != "exact"} for x in results]
    todo = [{k: v for k, v in x.items() if k != "exact"} for x in todo]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool, path.open("a") as file:
        for future in as_completed([pool.submit(run, args.folder, x) for x in todo if x not in done]):
            print(json.dumps(future.result()), file=file, flush=True)
            print(future.result(), flush=True)


if __name__ == "__main__":
    main()
