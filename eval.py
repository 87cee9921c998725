"""Puts a reward on a base and prints what it is worth.

python eval.py --reward out/shapes-0/reward.pt --base out/shapes-0/new.pt
python eval.py --reward reward.pt --base laion/CLIP-ViT-B-16-laion2B-s34B-b88K --beta 0.5 1 2
python eval.py --reward reward.pt --base new.pt --tuned ft.pt --oracle new_ft.pt --picture grid.png
python eval.py --reward out/gsm8k-prt.pt --base Qwen/Qwen2.5-7B --limit 200
python eval.py --reward reward.pt --base Qwen/Qwen2.5-7B --prompt "Where does a reward go?"
python eval.py --reward reward.pt --base Qwen/Qwen2.5-7B --data ifeval.jsonl
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import prt
from data import images, text
from models import weights
from models.clip import classifier

PROC = Path("/proc/self")
NUMBER = re.compile(r"#### *(-?[\d,]*\.?\d+)")  # GSM8K's form of an answer
SHADES = ((4, 203), (2, 209), (1, 216), (0.5, 223), (0.1, 230))  # KL in nats -> terminal colour
COLUMNS = dict(top1=("top-1", "{:.2%}"), form=("in form", "{:.1%}"), exact=("exact", "{:.1%}"),
               error=("s.e.", "{:.1%}"), nll=("NLL", "{:.3f}"), accuracy=("tokens", "{:.1%}"),
               kl=("KL", "{:.3f}"), ms=("ms/image", "{:.3f}"), speed=("tokens/s", "{:.0f}"),
               mib=("MiB", "{:.1f}"))


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", nargs="+", required=True, help="reward checkpoints; several are added up")
    p.add_argument("--base", required=True, help="the base to put it on: checkpoint, folder or hub id")
    p.add_argument("--data", help="the test data, where it is not the reward's own; text: also IFEval's file")
    p.add_argument("--beta", nargs="+", type=prt.positive(float), help="default: the one it was trained with")
    p.add_argument("--tuned", help="the source fine-tuned (--method ft): adds EFT")
    p.add_argument("--ref", help="the source base (default: the one that the checkpoint names)")
    p.add_argument("--oracle", help="the new base itself fine-tuned: the upper line")
    p.add_argument("--json", help="write the table to this file")
    p.add_argument("--batch", type=prt.positive(int), default=128)
    p.add_argument("--device")
    p.add_argument("--picture", help="images: draw a grid of test images with both answers to this .png")
    p.add_argument("--prompt", help="text: answer this, once alone and once with the reward, and stop")
    p.add_argument("--limit", type=prt.positive(int), help="text: the first N examples alone")
    p.add_argument("--new-tokens", type=prt.positive(int), help="text: the longest answer (256)")
    p.add_argument("--temperature", type=float, default=0.0, help="text: sample (0: the likeliest token)")
    p.add_argument("--top-p", type=prt.positive(float), default=1.0, help="text: sample from this share")
    p.add_argument("--seed", type=int, default=0, help="text: of the samples")
    p.add_argument("--speculative", action="store_true", help="text: the reward drafts, the base checks")
    p.add_argument("--compile", action="store_true", help="text: torch.compile, on a GPU with CUDA graphs")
    p.add_argument("--responses", default="responses", help="IFEval: folder for the responses")
    return p.parse_args()


def main():
    args = parse()
    device = prt.setup(args.device)
    dtype = prt.frozen_dtype(device)
    models = {args.reward[0]: weights.load(args.reward[0], "prt", dtype=dtype)}
    info = models[args.reward[0]].info
    is_text = info["kind"] == "gpt"
    if not is_text:
        prompts = images.prompts(info["classes"], info["templates"])

    def load(source, role):
        model = weights.load(source, role, is_text, dtype)
        return model if is_text or role != "base" else classifier(model.to(device), prompts)

    if not args.temperature >= 0:
        raise ValueError(f"--temperature {args.temperature}: 0 or more")
    source = args.ref or info["source"]
    for path in args.reward[1:]:
        models[path] = models.get(path) or load(path, "prt")
    rewards = [models[path] for path in args.reward]
    base = models[args.base] = load(args.base, "base")
    tuned, oracle = (path and models.setdefault(path, load(path, "ft")) for path in (args.tuned, args.oracle))
    for path, used in ((args.tuned, source), (args.oracle, args.base)):
        if path and models[path].info["source"] != used:
            print(f"note: {path} was tuned from {models[path].info['source']}; the table takes {used} for it")
    try:
        ref = models[source] = base if source == args.base else load(source, "base")
    except OSError as error:
        if args.ref or args.tuned:
            raise
        ref = print(f"the rows of the source base are left out: {error}")
    for model in models.values():
        model.to(device)
    world = language if is_text else vision
    world(args, device, models, list(plan(args, base, rewards, ref, tuned, oracle)))


def plan(args, base, rewards, ref, tuned, oracle):
    """The table's rows: (label, beta, base that the KL is from, base, rewards as prt.generate takes them)."""
    yield "base alone", None, base, base, []
    groups = [("reward (PRT)", rewards)]
    if len(rewards) > 1:
        groups = [(f"{path} (PRT)", [r]) for path, r in zip(args.reward, rewards)]
        groups.append(("sum of rewards", rewards))
    for title, group in groups:
        for beta in args.beta or [group[0].info["beta"]]:
            own = [(m.info["beta"] / (beta if args.beta else m.info["beta"]), m) for m in group]
            yield f"base + {title}", beta, base, base, own
    if ref:
        yield "source alone", None, ref, ref, []
        yield "source + reward", rewards[0].info["beta"], ref, ref, [(1.0, rewards[0])]
    if tuned:
        yield "source fine-tuned", None, ref, tuned, []
        yield "base + EFT", None, base, base, [(1.0, tuned), (-1.0, ref)]
    if oracle:
        yield "base fine-tuned", None, base, oracle, []


def vision(args, device, models, rows):
    """The table, and the picture, of images."""
    info = models[args.reward[0]].info
    name = args.data or info["data"]
    view = functools.cache(lambda size: images.load(name, "test", size))  # each model at its own resolution
    data = view(models[args.reward[0]].arch["image_size"])
    for path in args.reward:
        same_classes(path, models[path].info["classes"], f"--data {name}", data.classes)
    for path in filter(None, (args.tuned, args.oracle)):
        same_classes(path, models[path].info["classes"], args.reward[0], info["classes"])

    # One pass of each model; every row of the table is arithmetic on these logits.
    @functools.cache
    def logits(model):
        return prt.predict(model, view(model.arch["image_size"]).images, args.batch).cpu()

    @functools.cache
    def cost(*used):
        inputs = [view(m.arch["image_size"]).images[: args.batch].to(device) for m in used]
        return measure(used, lambda: [prt.predict(m, x, len(x)) for m, x in zip(used, inputs)], device)

    answers = []
    for i, (label, beta, own_base, base, rewards) in enumerate(rows):
        log_probs = prt.mixture(base, rewards, logits)
        seconds, mib, _ = cost(base, *(m for _, m in rewards))
        rows[i] = dict(method=label, beta=beta, top1=prt.accuracy(log_probs, data.labels),
                       nll=F.nll_loss(log_probs, data.labels).item(), mib=mib,
                       kl=prt.kl(log_probs, logits(own_base)).mean().item(),
                       ms=1000 * seconds / min(args.batch, len(data.labels)))
        answers.append(log_probs.argmax(-1))
    table(args, device, rows, dict(data=name, images=len(data.labels)))
    if args.picture:
        with weights.atomic(args.picture) as f:
            picture(data, *answers[:2]).save(f, "PNG")
        print(f"{args.picture}: upper answer base alone, lower answer {rows[1]['method']}")


def language(args, device, models, rows):
    """The table of text, or what one prompt is answered, or the responses to IFEval's prompts."""
    reward = models[args.reward[0]]
    name = args.data or reward.info["data"]
    tokenizer, end = weights.same_vocabulary(models), reward.arch["end"]
    room = min(m.arch["positions"] for m in models.values())

    def respond(base, rewards, prompts):
        """Greedy or sampled answers (ids) to prompts (ids), in batches of similar lengths."""
        longest = max(map(len, prompts))
        length = args.new_tokens or max(1, min(256, room - longest))
        if longest + length > room:
            raise ValueError(f"a prompt of {longest} tokens and an answer of {length} (--new-tokens) are "
                             f"more than the {room} positions of these models")
        if not all(prompts):
            raise ValueError(f"{name}: holds an empty prompt, to which there is no answer")
        generator = torch.Generator(device).manual_seed(args.seed)
        out = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in tqdm(range(0, len(order), args.batch), desc="generate", disable=None, leave=False):
            some = order[start:start + args.batch]
            T = len(prompts[some[-1]])
            pad = [T - len(prompts[i]) for i in some]
            ids = torch.tensor([[end] * n + prompts[i] for n, i in zip(pad, some)], device=device)
            pad = torch.tensor(pad, device=device) if any(pad) else None
            new = prt.generate(base, rewards, ids, length=length, end=end, pad=pad,
                               temperature=args.temperature, top_p=args.top_p, generator=generator,
                               speculative=args.speculative, compile=args.compile)
            for i, row in zip(some, new[:, T:].tolist()):
                out[i] = row[:row.index(end)] if end in row else row
        return out

    def asked(prompt):
        return tokenizer.begin + tokenizer.encode(reward.info["template"].replace("{}", prompt))

    if args.prompt:
        prompt = asked(args.prompt)
        for label, _, _, base, rewards in rows[:2]:
            answer, = respond(base, rewards, [prompt])
            print(f"{label}:{coloured(*rows[1][3:], prompt, answer, tokenizer, device)}\n")
        return
    path = Path(name)
    first = next(text.rows(path), ("", {}))[1] if path.is_file() and path.suffix == ".jsonl" else {}
    if "instruction_id_list" in first:
        docs = [row for _, row in text.rows(path)]
        if lost := [i + 1 for i, doc in enumerate(docs) if not isinstance(doc.get("prompt"), str)]:
            raise ValueError(f"{path}: row {lost[0]} has no prompt")
        prompts = [asked(doc["prompt"]) for doc in docs[: args.limit]]
        return ifeval(args, docs, rows, lambda base, rewards: [
            tokenizer.decode(answer) for answer in respond(base, rewards, prompts)])
    examples = text.load(name, "train" if args.data and path.is_file() else "test")[1][: args.limit]
    prompts = [text.token_ids(parts[:-1], tokenizer, end)[0] for _, parts in examples]
    truth = [number(parts[-1][0]) for _, parts in examples]
    data = text.encode(examples, tokenizer, end, room)
    order = torch.tensor([len(ids) for ids in data.ids]).argsort()
    batches = [text.collate(data, i, device) for i in order.split(args.batch)]
    for i, (label, beta, own_base, base, rewards) in enumerate(rows):
        if args.compile:  # the clock shall not count it
            respond(base, rewards, prompts[: args.batch])
        seconds, mib, answers = measure([base, *(m for _, m in rewards)],
                                        lambda: respond(base, rewards, prompts), device, repeats=0)
        found = [number(tokenizer.decode(answer)) for answer in answers]
        form = sum(x is not None for x in found) / len(found)
        exact = sum(x is not None and x == y for x, y in zip(found, truth)) / len(found)
        moved = rewards if base is own_base else [(1.0, base), (-1.0, own_base)]  # the same, for its KL
        rows[i] = dict(method=label, beta=beta, form=form, exact=exact, **prt.score(own_base, moved, batches),
                       error=math.sqrt(exact * (1 - exact) / len(found)), mib=mib,
                       speed=sum(len(answer) + 1 for answer in answers) / seconds)
    table(args, device, rows, dict(data=name, examples=len(examples)))


def same_classes(name, classes, other, other_classes):
    if classes != other_classes:
        differ = [f"{a!r} and {b!r}" for a, b in zip(classes, other_classes) if a != b] + ["the number"]
        raise ValueError(f"{name} has {len(classes)} classes, {other} {len(other_classes)}: they must be the "
                         f"same, but {differ[0]} differ")


def number(answer):
    """The number in GSM8K's form of an answer, "#### 1,234", or None."""
    found = NUMBER.search(answer)
    return found and float(found[1].replace(",", ""))


@torch.no_grad()
def coloured(base, rewards, prompt, answer, tokenizer, device):
    """The answer's text, a token the redder, the farther the rewards move it (KL of tilted from base)."""
    ids = torch.tensor([prompt + answer], device=device)
    logits = {policy: policy.head(policy.features(ids)[0, len(prompt) - 1:-1])
              for _, policy in [(1, base), *rewards]}
    kls = prt.kl(prt.mixture(base, rewards, logits.get), logits[base]).tolist()
    plain = "NO_COLOR" in os.environ or not sys.stdout.isatty()
    out, held, moved = "", b"", 0.0
    for token, kl in zip(answer, kls):
        held, moved = held + tokenizer.encoding.decode_single_token_bytes(token), max(moved, kl)
        with contextlib.suppress(UnicodeDecodeError):  # a character may need several tokens
            piece = held.decode()
            colour = next((colour for limit, colour in SHADES if moved >= limit), None)
            out += piece if plain or colour is None else f"\033[48;5;{colour}m\033[30m{piece}\033[0m"
            held, moved = b"", 0.0
    return out


def ifeval(args, docs, rows, respond):
    """Responses to IFEval's prompts as its scorer reads them, and their scores where lm_eval is installed."""
    try:
        from lm_eval.tasks.ifeval.utils import process_results
    except ImportError:
        process_results = print("no scores without lm_eval: pip install lm_eval[ifeval]")
    for label, beta, _, base, rewards in rows:
        responses = respond(base, rewards)
        name = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-") + (f"-{beta:g}" if beta else "")
        path = Path(args.responses) / f"{name}.jsonl"
        with weights.atomic(path) as f:
            f.writelines(json.dumps(dict(prompt=doc["prompt"], response=response)).encode() + b"\n"
                         for doc, response in zip(docs, responses))
        scores = ""
        if process_results:
            found = [process_results(doc, [response]) for doc, response in zip(docs, responses)]
            shares = {key: statistics.mean(v for d in found for v in (d[key] if "inst" in key else [d[key]]))
                      for key in found[0]}
            scores = f": {statistics.mean(shares.values()):.2%}, the mean of {shares}"
        print(f"{label}: {path}{scores}")


def measure(models, work, device, repeats=5):
    """(seconds, peak MiB, result) of work() with these models, the device synchronised.

    With repeats the first call does not count, and the median of the others does. The memory is that of the
    models' weights plus what the work adds at its peak.
    """
    size = sum(t.nbytes for m in set(models) for t in (*m.parameters(), *m.buffers()))
    clock, extra = [], 0.0
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # pages that are free already would hide the next peak
                (PROC / "clear_refs").write_text("5")  # Linux: the peak of the resident set starts again
        before, start = memory(device, "VmRSS"), time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter() - start)
        extra = max(extra, memory(device, "VmHWM") - before)
    return statistics.median(clock[1:] or clock), size / 2**20 + extra, result


def memory(device, key):
    """MiB in use ("VmRSS") or at its peak ("VmHWM"); nan where the system does not tell."""
    if device.type == "cuda":
        return (torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated)() / 2**20
    try:
        return int((PROC / "status").read_text().split(key + ":")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return math.nan


def table(args, device, rows, about):
    """Prints the rows, and writes them to --json."""
    cuda = device.type == "cuda"
    about |= dict(base=args.base, batch=args.batch, device=torch.cuda.get_device_name() if cuda else
                  f"CPU ({torch.get_num_threads()} threads)", dtype="bfloat16" if cuda else "float32",
                  torch=torch.__version__)
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    wide, columns = max(len(r["method"]) for r in rows), [k for k in COLUMNS if k in rows[0]]
    print(f"{'':{wide}}  {'beta':>5}" + "".join(f"{COLUMNS[k][0]:>10}" for k in columns))
    for r in rows:
        beta = "" if r["beta"] is None else f"{r['beta']:g}"
        cells = "".join(f"{COLUMNS[k][1].format(r[k]):>10}" for k in columns)
        print(f"{r['method']:{wide}}  {beta:>5}{cells}")
    if args.json:
        rows = [{k: None if v is math.nan else v for k, v in r.items()} for r in rows]
        with weights.atomic(args.json) as f:
            f.write(json.dumps(about | dict(rewards=args.reward, rows=rows), indent=1).encode())


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
