"""What only a GPU can tell: speed, memory, and kernels, in one Markdown table to paste into an issue.

python tests/measure/gpu.py            perhaps ten minutes on one GPU: sizes of Qwen2.5, random weights
python tests/measure/gpu.py --tiny     seconds, also on a CPU: tiny networks, and nothing that takes minutes
"""
import functools
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from unittest import mock

import bench  # first: it tells Python where the project is
import torch

import prt
from models import decode, flags, memory, runs

FULL = dict(scores=10**8, text="qwen2.5-0.5b", base="qwen2.5-1.5b", image="ViT-B-16", texts=128, batch=128,
            length=200, rows=(1, 64), new=64, steps=5, seed=0, accum=None, chunk=512,
            recompute=False)
TINY = FULL | dict(scores=10**5, text="tiny", base="tiny", image="tiny", texts=16, batch=16, length=16, new=8)


def selection(args, device):
    """The threshold of a ticket's mask (models/tickets.py), found in two ways."""
    scores, k = torch.rand(args.scores, device=device), args.scores // 2
    ways = dict(kthvalue=lambda: scores.kthvalue(args.scores - k + 1).values,
                topk=lambda: scores.topk(k, sorted=False).values.min())
    yield from zip(ways, bench.alternate(device, 3, *ways.values()), [f"s for {args.scores:.0e} scores"] * 2)
    yield "kthvalue equals topk", "yes" if torch.equal(*(way() for way in ways.values())) else "NO", ""


def training(args, device):
    """A step of a text reward by --accum: time, memory beside that of models/memory.py, and launches."""
    model, cuda = bench.text_model(args.text, torch.device("meta")), device.type == "cuda"
    chosen, _ = memory.choose(args, args.length, model, model, device) if cuda else (None, None)
    short = Namespace(**vars(args) | dict(length=2))  # with long texts the host waits for the GPU
    for accum in filter(None, dict.fromkeys([16, 4, 2, chosen])):
        what, options = f"--accum {accum}", dict(accum=accum, chunk=args.chunk)
        try:
            step, _ = bench.step_times(args, device, **options)
            yield f"step, {what}", 1000 * step, "ms" + ", chosen by models/memory.py" * (accum == chosen)
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else "-"
            yield f"peak, {what}", peak, f"GiB; expected {bench.expected_memory(args, **options) / 2**30:.3g}"
            _, host = bench.step_times(short, device, **options)
            yield f"host, {what}", 1000 * host, "ms to launch a step, with texts of 2 tokens"
        except torch.OutOfMemoryError:
            yield f"step, {what}", "out of memory", ""


def decoding(args, device):
    """A token of a base with a reward; drafts of random weights as they are, and as if all were accepted."""
    base, reward = (bench.text_model(x, device, runs.frozen_dtype(device)) for x in (args.base, args.text))
    all_accepted = mock.patch("models.decode.accepted_drafts", lambda p, q, u: (u >= 0).sum(1))
    ways = {"eager": prt.generate, "speculative": decode.speculative,
            "speculative, all drafts accepted": all_accepted(decode.speculative)}
    if device.type == "cuda":  # on a CPU it takes minutes to compile
        ways["compiled"] = decode.compiled
    for name, rows in [(name, rows) for name in ways for rows in args.rows]:
        ids = torch.randint(500, (rows, 32), device=device)
        way = functools.partial(ways[name], base, [(1.0, reward)], ids, length=args.new)
        ms = 1000 * bench.alternate(device, 3, way)[0] / args.new
        yield f"decoding, batch {rows}, {name}", ms, f"ms a step, {1000 * rows / ms:.0f} tokens/s"


def attention(args, device):
    """The kernels of attention."""
    few = Namespace(**vars(args) | dict(texts=2, steps=1))
    model = bench.text_model(args.text, device, runs.frozen_dtype(device))
    ids = torch.randint(500, (2, 32), device=device)
    ways = {"training": bench.text_trainer(few, device, "prt"),
            "image tower": bench.image_trainer(few, device, "prt")}
    for kind, pad in {"": None, "padded ": torch.arange(2, device=device)}.items():
        kv = model.cache(2, 64, pad)
        ways |= {f"{kind}prompt": functools.partial(model.features, ids, kv),
                 f"decoding after a {kind}prompt": functools.partial(model.features, ids[:, :1], kv)}
    rows = [(f"attention, {name}", ", ".join(bench.attention_kernels(way)), "") for name, way in ways.items()]
    yield from [*rows, ("attention, any by the math kernel", "yes" if "math" in str(rows) else "no", "")]


def rate(args, device):
    """The rate that prt.fit returns, over the one by the clock."""
    rates, train = [], bench.text_trainer(args, device, "prt", accum=16, chunk=args.chunk)
    seconds, = bench.alternate(device, 1, lambda: rates.append(train()[-1]["per_second"]))
    yield "fit's rate / clock's", rates[-1] * seconds / args.steps / args.texts, f"{rates[-1]:.1f}/s by fit"


def examples(args, device):
    """The README's examples: seconds, and top-1 or exact match of the new base with the reward."""
    prt.check(not args.tiny, "left out of --tiny: they take minutes on a CPU")
    for script, column in {"train_vision.py": 5, "train_lm.py": 6}.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            table = subprocess.check_output([sys.executable, bench.ROOT / script, "--out", out], text=True)
        row, = (line.split() for line in table.splitlines() if line.startswith("base + reward (PRT)"))
        yield script, time.perf_counter() - start, f"s; new base + reward {row[column]}"


def main():
    """Prints the table, each row as soon as it is measured."""
    p = flags.parser(__doc__)
    p.add_argument("--tiny", action="store_true", help="tiny networks")
    args = p.parse_args()
    vars(args).update(TINY if args.tiny else FULL)
    device = runs.setup(None if args.tiny else "cuda")
    print(f"{bench.conditions(device, args.seed)}\n\n| what | value | unit or note |\n|---|---|---|")
    for part in (selection, training, decoding, attention, rate, examples):
        try:
            for what, value, note in part(args, device):
                value = f"{value:.4g}" if isinstance(value, float) else value
                print(f"| {what} | {value} | {note} |", flush=True)
        except Exception as error:  # of which the other parts' rows must not be lost
            print(f"| {part.__name__} | not measured | {str(error).partition(chr(10))[0]} |", flush=True)


if __name__ == "__main__":
    runs.main(main)
