"""Puts a reward on a base and prints what it is worth.

python eval.py --reward out/shapes-0/reward.pt --base out/shapes-0/new.pt
python eval.py --reward reward.pt --base laion/CLIP-ViT-B-16-laion2B-s34B-b88K --beta 0.5 1 2
python eval.py --reward reward.pt --base new.pt --tuned ft.pt --oracle new_ft.pt --picture grid.png
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import prt
from data import images
from models import weights
from models.clip import classifier

PROC = Path("/proc/self")
COLUMNS = dict(top1="{:.2%}", nll="{:.3f}", kl="{:.3f}", ms="{:.3f}", mib="{:.1f}")
HEADINGS = dict(top1="top-1", nll="NLL", kl="KL", ms="ms/image", mib="MiB")


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", nargs="+", required=True, help="reward checkpoints; several are added up")
    p.add_argument("--base", required=True, help="the base to put it on: checkpoint, folder or hub id")
    p.add_argument("--data", help="the test data, where it is not the reward's own")
    p.add_argument("--beta", nargs="+", type=prt.positive(float), help="default: the one it was trained with")
    p.add_argument("--tuned", help="the source fine-tuned (train_vision.py --method ft): adds EFT")
    p.add_argument("--ref", help="the source base (default: the one that the checkpoint names)")
    p.add_argument("--oracle", help="the new base itself fine-tuned: the upper line")
    p.add_argument("--picture", help="draw a grid of test images with both answers to this .png")
    p.add_argument("--json", help="write the table to this file")
    p.add_argument("--batch", type=prt.positive(int), default=128)
    p.add_argument("--device")
    return p.parse_args()


def main():
    args = parse()
    device = prt.setup(args.device)
    rewards = [weights.load(path, "prt") for path in args.reward]
    info = rewards[0].info
    name = args.data or info["data"]
    view = functools.cache(lambda size: images.load(name, "test", size))  # each model at its own resolution
    data = view(rewards[0].arch["image_size"])
    for path, model in zip(args.reward, rewards):
        same_classes(path, model.info["classes"], f"--data {name}", data.classes)
    prompts = images.prompts(info["classes"], info["templates"])

    def zero_shot(source):
        return classifier(weights.load(source, "clip").to(device), prompts).cpu()

    base = zero_shot(args.base)
    tuned = weights.load(args.tuned, "ft") if args.tuned else None
    oracle = weights.load(args.oracle, "ft") if args.oracle else None
    source = args.ref or info["source"]
    for path, model, used in ((args.tuned, tuned, source), (args.oracle, oracle, args.base)):
        if model:
            same_classes(path, model.info["classes"], args.reward[0], info["classes"])
            if model.info["source"] != used:
                print(f"note: {path} was tuned from {model.info['source']}; the table takes {used} for it")
    try:
        ref = zero_shot(source)
    except OSError as error:
        if args.ref or args.tuned:
            raise
        ref = print(f"the rows of the source base are left out: {error}")

    # One pass of each model; every row of the table is arithmetic on these logits.
    @functools.cache
    def logits(model):
        out = prt.predict(model.to(device), view(model.arch["image_size"]).images, args.batch).cpu()
        model.cpu()
        return out

    @functools.cache
    def cost(*models):
        return measure(models, [view(m.arch["image_size"]).images[: args.batch] for m in models], device)

    rows = []

    def row(label, log_probs, own_base, *models, beta=None):
        ms, mib = cost(*models)
        rows.append(dict(method=label, beta=beta, top1=prt.accuracy(log_probs, data.labels),
                         nll=F.nll_loss(log_probs, data.labels).item(), ms=ms, mib=mib,
                         kl=prt.kl(log_probs, own_base).mean().item()))
        return log_probs

    answers = [row("base alone", F.log_softmax(logits(base), -1), logits(base), base)]
    for title, group in added(args.reward, rewards):
        for beta in args.beta or [group[0].info["beta"]]:
            log_probs = tilted(logits(base), group, logits, args.beta and beta)
            answers.append(row(f"base + {title}", log_probs, logits(base), base, *group, beta=beta))
    if ref:
        row("source alone", F.log_softmax(logits(ref), -1), logits(ref), ref)
        row("source + reward", tilted(logits(ref), rewards[:1], logits), logits(ref), ref, rewards[0],
            beta=info["beta"])
    if tuned:
        row("source fine-tuned", F.log_softmax(logits(tuned), -1), logits(ref), tuned)
        eft = prt.tilt(logits(base), prt.reward(logits(tuned), logits(ref)))
        row("base + EFT", eft, logits(base), base, tuned, ref)
    if oracle:
        row("base fine-tuned", F.log_softmax(logits(oracle), -1), logits(base), oracle)

    cuda = device.type == "cuda"
    about = dict(data=name, images=len(data.labels), base=args.base, rewards=args.reward, batch=args.batch,
                 device=torch.cuda.get_device_name() if cuda else f"CPU ({torch.get_num_threads()} threads)",
                 dtype="bfloat16 autocast" if cuda else "float32", torch=torch.__version__)
    table(rows, about)
    if args.json:
        for r in rows:
            r["mib"] = None if math.isnan(r["mib"]) else r["mib"]
        with weights.atomic(args.json) as f:
            f.write(json.dumps(about | dict(rows=rows), indent=1).encode())
    if args.picture:
        with weights.atomic(args.picture) as f:
            picture(data, *(a.argmax(-1) for a in answers[:2])).save(f, "PNG")
        print(f"{args.picture}: upper answer base alone, lower answer {rows[1]['method']}")


def same_classes(name, classes, other, other_classes):
    if classes != other_classes:
        differ = [f"{a!r} and {b!r}" for a, b in zip(classes, other_classes) if a != b] + ["the number"]
        raise ValueError(f"{name} has {len(classes)} classes, {other} {len(other_classes)}: they must be the "
                         f"same, but {differ[0]} differ")


def added(paths, rewards):
    """(title, rewards) of each reward alone and, where there are several, of their sum."""
    if len(rewards) == 1:
        return [("reward (PRT)", rewards)]
    return [(f"{path} (PRT)", [r]) for path, r in zip(paths, rewards)] + [("sum of rewards", rewards)]


def tilted(base_logits, rewards, logits, beta=None):
    """Log-probabilities of the base tilted by the sum of r / beta; beta: by default that of each training."""
    r = sum(prt.reward(logits(m), beta=m.info["beta"]) / (beta or m.info["beta"]) for m in rewards)
    return prt.tilt(base_logits, r)


def measure(models, inputs, device, repeats=5):
    """(ms per image, peak MiB) of one batch through all the models, one after the other.

    The device is synchronised. The first batch does not count, the median of the others does. The memory is
    that of these models' weights plus what the batch adds at its peak.
    """
    inputs = [x.to(device) for x in inputs]
    models = [m.to(device) for m in models]
    size = sum(t.nbytes for m in models for t in (*m.parameters(), *m.buffers()))
    clock, extra = [], 0.0
    for _ in range(repeats + 1):
        before = reset_peak(device)
        start = time.perf_counter()
        for model, x in zip(models, inputs):
            prt.predict(model, x, len(x))
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter() - start)
        extra = max(extra, peak(device) - before)
    for model in models:
        model.cpu()
    return 1000 * statistics.median(clock[1:]) / len(inputs[0]), size / 2**20 + extra


def reset_peak(device):
    """Forgets the peak of the memory; returns what is in use, in MiB (nan where the system does not tell)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # pages that are free already would hide the next peak
    with contextlib.suppress(OSError):
        (PROC / "clear_refs").write_text("5")  # Linux: the peak of the resident set starts again
    return resident("VmRSS")


def peak(device):
    return prt.peak_memory(device) if device.type == "cuda" else resident("VmHWM")


def resident(key):
    try:
        return int((PROC / "status").read_text().split(key + ":")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return math.nan


def table(rows, about):
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items() if k != "rewards"))
    wide = max(len(r["method"]) for r in rows)
    print(f"{'':{wide}}  {'beta':>5}" + "".join(f"{h:>10}" for h in HEADINGS.values()))
    for r in rows:
        beta = "" if r["beta"] is None else f"{r['beta']:g}"
        print(f"{r['method']:{wide}}  {beta:>5}" + "".join(f"{COLUMNS[k].format(r[k]):>10}" for k in COLUMNS))


def picture(data, *answers, columns=8, rows=4, cell=120):
    """A grid of random test images, under each two models' answers [N]: right ones green, wrong ones red."""
    n = min(columns * rows, len(data.labels))
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:n].tolist()
    sheet = Image.new("RGB", (columns * cell, -(-n // columns) * (cell + 30)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, i in enumerate(chosen):
        x, y = place % columns * cell, place // columns * (cell + 30)
        image = Image.fromarray(data.images[i].permute(1, 2, 0).numpy())
        sheet.paste(image.resize((cell - 6, cell - 6), Image.BICUBIC), (x + 3, y + 3))
        for line, answer in enumerate(answers):
            name, right = data.classes[answer[i]], answer[i] == data.labels[i]
            while pen.textlength(name, font) > cell - 6:
                name = name[:-2] + "…"
            pen.text((x + 4, y + cell - 2 + 14 * line), name, "green" if right else "red", font)
    return sheet


if __name__ == "__main__":
    prt.run(main)
