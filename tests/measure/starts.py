"""Measures what the start of a reward on text brings to a new base: a copy of the source, or less of it.

python tests/measure/starts.py choose out      chooses each row's recipe, on facts that are set apart for it
python tests/measure/starts.py test out        trains with the chosen recipes, and scores on the test problems
python tests/measure/starts.py table out       prints both as tables
python tests/measure/starts.py stories s       the second world; s has stories/ and new.pt of RESULTS.md

out: where `python train_lm.py` and the same with --seed 1 and 2 have written their folders, of which the
bases are used. Results are kept in starts.jsonl; what is there is not run again. Two processes run at
once, with one thread each: an hour in all.

Protocol, written down before any figure of the test problems was seen. Rows: a reward that starts as a copy
of the source with the searched recipe (weight decay 1), as a copy without weight decay (the paper's), as the
copied body with a new output matrix, and from random weights; beside them EFT and the fine-tuned new base.
Sizes: the first 200, 1,000, or all 4,000 tuning problems. Facts: a fifth of those that the old base lacks is
set apart; problems about it choose, and the test problems about the other facts are the test. Chosen for
each row and size: learning rate, steps, and for EFT weight decay, by exact match of 500 problems, with the
bases of seed 0 and one order of batches; the standard deviation of a new output matrix is chosen once, by its
mean over the sizes. Test: the bases of seeds 0, 1, 2, and three other orders of batches each (--seed 11, 12,
13).
The goal: the new output matrix, without weight decay, is at least as good as the searched recipe for every
size, and above 85% for every seed at 4,000.

Stories (stories260K, whose output matrix is tied, and its further trained base): the same rows, 60 steps. The
learning rate, of 5e-4 and 2e-3, is chosen by the NLL of the held-out fifth of the tuning stories with the new
base and the reward, for one order of batches; then the NLL of the test stories is taken for three others.
"""
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
from models import answers, flags, gpt, runs, scores, weights

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
STORIES = str(Path(__file__).parents[1] / "fixtures/stories260k")


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
    """Yields the cells to choose from; the scale of a new output matrix with one learning rate only."""
    for row, (_, rates, scales, decays) in ROWS.items():
        for rate, scale, decay, steps in itertools.product(rates, scales, decays, STEPS):
            left_out = [scale in (0.1, 1.0) and rate != "1e-3", row == "copy (the paper)" and steps == 300,
                        row == "EFT" and (rate, decay) == ("1e-3", "1")]
            if not any(left_out):
                yield dict(part="choose", row=row, size=size, rate=rate, scale=scale, decay=decay,
                           steps=steps, seed=0, order=ORDER)


def train(cell, source, *options):
    """Trains as a cell says, and returns the model."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()), mock.patch.object(gpt, "HEAD_STD", cell["scale"]):
        path = f"{place}/model.pt"
        words = f"--lr {cell['rate']} --steps {cell['steps']} --weight-decay {cell['decay']}".split()
        words += [*ROWS[cell["row"]][0].split(), "--source", source, "--seed", str(cell["order"]), *options]
        words += ["--out", path]
        train_lm.train(train_lm.parse(words), torch.device("cpu"), None)
        return weights.load(path)


def run(folder, cell):
    """Returns the cell with the exact match of one training run."""
    old, new = (f"{folder}/arithmetic-{cell['seed']}/{name}.pt" for name in ("old", "new"))
    source = new if cell["row"] == "new base fine-tuned" else old
    with mock.patch.dict(arithmetic.COUNTS, train=cell["size"]):
        model = train(cell, source, *BATCH.split())
    base, frozen = weights.load(new), weights.load(old)
    row = Row("", None, base, [(1.0, model)], base)
    if cell["row"] == "EFT":
        row = row._replace(rewards=[(1.0, model), (-1.0, frozen)])
    if cell["row"] == "new base fine-tuned":
        row = row._replace(base=model, rewards=[])
    tokenizer, end = Tokenizer(base.info["tokenizer"], new), base.arch["end"]
    examples = problems(cell["part"])
    prompts = [text.token_ids(parts[:-1], tokenizer, end)[0] for _, parts in examples]
    truth = [answers.final_number(parts[-1][0]) for _, parts in examples]
    written = answers.generate(row, prompts, answers.Decoding(new_tokens=16), [end], 256)
    return cell | dict(exact=answers.exact_match(truth, written, tokenizer)["exact"])


def run_stories(folder, cell):
    """Returns the cell with the NLL of held-out or of test stories, with the new base."""
    data = str(Path(folder, "stories"))
    options = ["--data", data, "--length", "512", "--batch", "16", "--accum", "1", "--hold-out", "0.2"]
    model = train(cell, STORIES, *options)
    base, source = weights.load(f"{folder}/new.pt"), weights.load(STORIES)
    tokenizer, test = Tokenizer(base.info["tokenizer"], "new.pt"), cell["part"] == "test"
    examples = text.load(data, "test" if test else "train")[1]
    tokens = text.encode(examples, tokenizer, base.arch["end"], 512)
    chosen = torch.arange(len(tokens.ids)) if test else runs.hold_out(len(tokens.ids), 0.2)[1]
    rewards = [(1.0, model)] + ([(-1.0, source)] if cell["row"] == "EFT" else [])
    batches = text.batches(tokens, chosen, 8192)
    return cell | dict(nll=scores.score_texts(base, rewards, batches)["nll"])


def stories(folder, pool):
    """Prints what is chosen for stories, and its NLL on the test stories."""
    for row, (_, _, scales, decays) in ROWS.items():
        if row == "new base fine-tuned":
            continue
        cells = [dict(part="choose", row=row, rate=rate, scale=scales[len(scales) // 2], decay=decays[-1],
                      steps=60, order=ORDER) for rate in ("5e-4", "2e-3")]
        tried = [*pool.map(run_stories, [folder] * len(cells), cells)]
        best = min(tried, key=lambda x: x["nll"])
        cells = [best | dict(part="test", order=order) for order in ORDERS]
        found = [x["nll"] for x in pool.map(run_stories, [folder] * len(cells), cells)]
        held_out = ", ".join(f"{x['rate']}: {x['nll']:.3f}" for x in tried)
        print(f"| {row} | {held_out} | {', '.join(f'{x:.3f}' for x in found)} |", flush=True)


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
            recipe = f"{x['rate']}, {x['decay']}, {x['steps']}, {x['scale'] or '-'}"
            print(f"| {x['row']} | {x['size']} | {recipe} | {mark}{x['exact']:.1%}{mark} |")
    print(f"\n| row | {' | '.join(f'{size} problems' for size in SIZES)} | by seed at {SIZES[-1]} |")
    print("|---" * (len(SIZES) + 2) + "|")
    for row in ROWS:
        found = [x for x in results if (x["part"], x["row"]) == ("test", row)]
        exact = [[x["exact"] for x in found if x["size"] == size] for size in SIZES]
        by_seed = [[x["exact"] for x in found if (x["size"], x["seed"]) == (SIZES[-1], s)] for s in SEEDS]
        cells = [f"{statistics.mean(x):.1%} ({min(x):.1%} to {max(x):.1%})" if x else "-" for x in exact]
        means = ", ".join(f"{statistics.mean(x):.1%}" for x in by_seed if x)
        print(f"| {row} | {' | '.join(cells)} | {means} |")


def main():
    p = flags.parser(__doc__)
    p.add_argument("part", choices=("choose", "test", "table", "stories"))
    p.add_argument("folder")
    args = p.parse_args()
    processes = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))  # they start with the first run
    if args.part == "stories":
        with processes as pool:
            return stories(args.folder, pool)
    path = Path(args.folder, "starts.jsonl")
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if args.part == "table":
        return table(results)
    if args.part == "choose":
        todo = [cell for size in SIZES for cell in cells(size)]
    else:
        todo = [x | dict(part="test", seed=seed, order=order) for order in ORDERS for seed in SEEDS
                for x in chosen(results).values()]
    done = [{k: v for k, v in x.items() if k != "exact"} for x in results]
    todo = [{k: v for k, v in x.items() if k != "exact"} for x in todo]
    with processes as pool, path.open("a") as file:
        for future in as_completed([pool.submit(run, args.folder, x) for x in todo if x not in done]):
            print(json.dumps(future.result()), file=file, flush=True)
            print(future.result(), flush=True)


if __name__ == "__main__":
    runs.main(main)
