"""Adds a reward to a base, and prints a table of scores or answers to a prompt.

python eval.py --run out/shapes-0                    the models that a training script made without arguments
python eval.py --reward reward.pt --base laion/CLIP-ViT-B-16-laion2B-s34B-b88K --beta 0.5 1 2
python eval.py --reward reward.pt --base new.pt --tuned ft.pt --oracle new_ft.pt --picture grid.png
python eval.py --reward reward.pt --base new.pt --beta 1 auto      and beta chosen on held-out examples
python eval.py --reward out/gsm8k-prt.pt --base Qwen/Qwen2.5-7B --limit 200
python eval.py --reward reward.pt --base Qwen/Qwen2.5-7B --prompt "Where does a reward go?"
python eval.py --reward reward.pt --base Qwen/Qwen2.5-7B --tasks gsm8k ifeval hellaswag

With --speculative the rewards draft together with their source base (--ref), or the first reward alone if
that is not found. In the row of EFT, the model in --tuned drafts.
"""
import argparse
import codecs
import functools
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from models import flags

BETAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # that --beta auto chooses from
NUMBER = re.compile(r"#### *(-?[\d,]*\.?\d+)")  # GSM8K's form of an answer
SHADES = ((4, 203), (2, 209), (1, 216), (0.5, 223), (0.1, 230))  # KL in nats -> terminal color
COLUMNS = dict(top1=("top-1", "{:.2%}"), form=("parsed", "{:.1%}"), exact=("exact", "{:.1%}"),
               error=("std. err.", "{:.1%}"), nll=("NLL", "{:.3f}"), accuracy=("token acc", "{:.1%}"),
               kl=("KL", "{:.3f}"), ms=("ms/image", "{:.3f}"), speed=("tokens/s", "{:.0f}"),
               mib=("MiB", "{:.1f}"), bytes=("bytes", "{:,}"))


def parse():
    """Returns the command line's arguments."""
    p = flags.parser(__doc__)
    models, table, answers = (p.add_argument_group(name) for name in ("models", "table", "answers to text"))
    models.add_argument("--run", help="folder of a training run without flags: sets the next five flags")
    models.add_argument("--reward", nargs="+", help="reward checkpoints; several are added up")
    models.add_argument("--base", help="base to add the reward to: checkpoint, folder, or Hub id")
    models.add_argument("--ref", help="source base, which the reward was trained on (default: stored in it)")
    models.add_argument("--tuned", help="fine-tuned source base (--method ft): adds a row for EFT")
    models.add_argument("--oracle", help="fine-tuned new base (--method ft): adds the upper bound")
    models.add_argument("--beta", nargs="+", type=beta, help="divides the reward: smaller adds more; one row "
                        "each (default: that of training); auto: the best on held-out training data")
    table.add_argument("--data", help="test data (default: the data set of the reward)")
    table.add_argument("--tasks", nargs="+", help="score on these tasks of lm-evaluation-harness (or .yaml "
                       "files) instead: pip install lm_eval")
    table.add_argument("--apply-chat-template", action="store_true", help="put the prompts of --tasks into "
                       "the template of the reward's training data, as --prompt is")
    table.add_argument("--limit", type=flags.positive(int), help="text: only so many examples (of each task)")
    table.add_argument("--batch", type=flags.positive(int), default=128, help="batch size (default: 128)")
    table.add_argument("--json", help="write the table to this file")
    table.add_argument("--picture", help="images: .png of both answers (default with --run: RUN/picture.png)")
    table.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    answers.add_argument("--prompt", help="prompt to answer without and with the reward, instead of a table")
    answers.add_argument("--new-tokens", type=flags.positive(int), help="per answer, at most (default: 256)")
    answers.add_argument("--temperature", type=float, default=0.0, help="0: no sampling (default: 0)")
    answers.add_argument("--top-p", type=flags.positive(float), default=1.0,
                         help="sample from the fewest tokens with this probability in total (default: 1)")
    answers.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    answers.add_argument("--speculative", action="store_true",
                         help="faster: small models draft tokens, and the base checks several in one pass")
    answers.add_argument("--compile", action="store_true", help="torch.compile, with CUDA graphs on CUDA")
    args = p.parse_args()
    if args.run:
        use_run(args)
    if not (args.reward and args.base):
        p.error(f"needs --reward and --base, or reward.pt and new.pt in the folder --run ({args.run})")
    if not args.temperature >= 0:
        p.error(f"argument --temperature: {args.temperature} is below 0")
    return args


def beta(text):
    return text if text == "auto" else flags.positive(float)(text)


def use_run(args):
    """Sets model flags that are not given to the files in --run that exist, and --picture to a file there."""
    names = dict(reward="reward", base="new", ref="old", tuned="tuned", oracle="oracle")
    for flag, name in names.items():
        path = Path(args.run) / f"{name}.pt"
        if getattr(args, flag) is None and path.exists():
            setattr(args, flag, [str(path)] if flag == "reward" else str(path))
    args.picture = args.picture or str(Path(args.run) / "picture.png")


if __name__ == "__main__":
    parse()  # prints --help and rejects mistyped flags before the imports below, which take seconds

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import prt
from data import files, images, text
from models import decode, runs, weights
from models.clip import classifier


class Models(NamedTuple):
    """The models that the table needs, on the device; None if they are not given."""

    rewards: list
    base: Any
    ref: Any
    tuned: Any
    oracle: Any


class Row(NamedTuple):
    """A row of the table: a base with (weight, policy) rewards, as in prt.mixture."""

    method: str
    beta: float | None
    kl_base: Any  # the model that the row's KL is measured from
    base: Any
    rewards: list
    drafter: Any = None  # of decode.speculative


def main():
    """Loads the models and prints what was asked for."""
    args = parse()
    device = runs.setup(args.device)
    models = load_models(args, device)
    if models.rewards[0].info["kind"] == "gpt":
        language(args, device, models)
    elif args.tasks or args.prompt:
        raise ValueError(f"--tasks and --prompt are for text, but {args.reward[0]} is a reward for images")
    else:
        image_table(args, device, models)


def load_models(args, device):
    """Returns the Models, each checked for its role; ref is None if it is not found and no flag needs it."""
    dtype = runs.frozen_dtype(device)
    reward = weights.load(args.reward[0], "prt", dtype=dtype, ref=args.ref).to(device)
    info, loaded = reward.info, {(args.reward[0], "prt"): reward}
    is_text = info["kind"] == "gpt"

    def load(path, role):
        if (path, role) not in loaded:
            ref = args.base if path == args.oracle else args.ref
            model = weights.load(path, role, is_text, dtype, ref).to(device)
            if role == "base" and not is_text:
                model = classifier(model, images.prompts(info["classes"], info["templates"]))
            loaded[path, role] = model
        return loaded[path, role]

    rewards, base = [load(path, "prt") for path in args.reward], load(args.base, "base")
    args.ref, ref_is_needed = args.ref or info["source"], args.ref or args.tuned
    tuned, oracle = (path and load(path, "ft") for path in (args.tuned, args.oracle))
    for path, model, start in ((args.tuned, tuned, args.ref), (args.oracle, oracle, args.base)):
        if model and Path(model.info["source"]).resolve() != Path(start).resolve():
            print(f"note: {path} was tuned from {model.info['source']}, but the table uses it with {start}")
    try:
        ref = load(args.ref, "base")
    except OSError as error:
        if ref_is_needed:
            raise
        print(f"the rows of the source base are left out; --ref names it: {error}")
        ref = None
    return Models(rewards, base, ref, tuned, oracle)


def held_out_share(args, models):
    """Returns the share of the training split that was held out of training, for --beta auto to choose on.

    Raises ValueError unless the same share of the same data was held out for all rewards and --tuned.
    """
    trained = [model for model in (*models.rewards, models.tuned) if model]
    splits = [(x.info["data"], x.info.get("args", {}).get("hold_out", 0.0)) for x in trained]
    for path, (data, share) in zip((*args.reward, args.tuned), splits):
        if (data, share) != splits[0] or not share:
            raise ValueError(f"--beta auto: {path} was trained with --data {data} --hold-out {share:g}; all "
                             "rewards and --tuned must have the same data, and the same --hold-out above 0")
    return share


def how_chosen(args, models, score):
    """Returns the table's entry on --beta auto, if it is given; score: what beta was chosen by."""
    if "auto" not in (args.beta or []):
        return {}
    return {"beta chosen by": f"{score} of the {held_out_share(args, models):.0%} of training data held out"}


def plan(args, models, quality):
    """Returns the rows of the table; quality: function from a Row to its score on held-out data."""
    rewards, base, ref, tuned, oracle = models

    def at_betas(method, terms, ref=None):
        for beta in args.beta or [None]:
            if beta == "auto":
                row = max((tilted_row(method, base, terms, ref, beta) for beta in BETAS), key=quality)
                yield row._replace(method=f"{method}, beta chosen")
            else:
                yield tilted_row(method, base, terms, ref, beta)

    terms = [(model.info["beta"], model) for model in rewards]
    rows = [Row("base alone", None, base, base, [])]
    for path, term in zip(args.reward, terms):
        name = path if len(rewards) > 1 else "reward"
        rows += at_betas(f"base + {name} (PRT)", [term], ref)
    if len(rewards) > 1:
        rows += at_betas("base + sum of rewards", terms, ref)
    if ref:
        rows += [Row("source alone", None, ref, ref, []), tilted_row("source + reward", ref, terms[:1])]
    if tuned:
        rows.append(Row("source fine-tuned", None, ref, tuned, []))
        rows += at_betas("base + EFT", [(tuned.info["beta"], tuned), (-tuned.info["beta"], ref)])
    if oracle:
        rows.append(Row("base fine-tuned", None, base, oracle, []))
    return rows


def tilted_row(method, base, terms, ref=None, beta=None):
    """Returns the Row of a base tilted at one beta, or by each reward at the beta that it was trained with.

    terms: (weight, policy) pairs for beta = 1: a reward with the beta of its training, or for EFT the tuned
    model with its beta and the source base with minus that. ref: the source base, which drafts for `base`
    together with the rewards, or None.
    """
    rewards = [(weight / (beta or abs(weight)), policy) for weight, policy in terms]
    return Row(method, beta or terms[0][0], base, base, rewards, ref and (ref, rewards))


def trained_models(args, models):
    """Returns the (path, model) pairs of all models but the bases that are given."""
    pairs = zip((*args.reward, args.tuned, args.oracle), (*models.rewards, models.tuned, models.oracle))
    return [(path, model) for path, model in pairs if model]


def file_bytes(args, models):
    """Returns model -> bytes of its file, for all but the bases; {} if all of them are of one kind."""
    sizes = {model: os.path.getsize(path) for path, model in trained_models(args, models)}
    kinds = {model.info.get("ticket", {}).get("kind") for model in sizes}
    return sizes if len(kinds) > 1 else {}


# Images

def image_table(args, device, models):
    """Prints the table of images, and draws the picture."""
    info = models.rewards[0].info
    name = args.data or info["data"]
    test = functools.cache(lambda size: images.load(name, "test", size))  # each model at its own resolution
    data = test(models.rewards[0].arch["image_size"])
    for path, classes in [(path, model.info["classes"]) for path, model in trained_models(args, models)]:
        if classes != data.classes:
            differ = [f"{a!r} and {b!r}" for a, b in zip(classes, data.classes) if a != b] + ["the numbers"]
            raise ValueError(f"{path} has {len(classes)} classes, --data {name} {len(data.classes)}: they "
                             f"must be the same, but {differ[0]} differ")

    @functools.cache
    def held_out(size):
        share, train = held_out_share(args, models), images.load(info["data"], "train", size)
        _, i = runs.hold_out(len(train.labels), share)
        return train._replace(images=train.images[i], labels=train.labels[i])

    # One pass of each model; every row of the table is arithmetic on these logits.
    @functools.cache
    def logits(model, split=test):
        return runs.predict(model, split(model.arch["image_size"]).images, args.batch).cpu()

    def quality(row):
        log_probs = prt.mixture(row.base, row.rewards, lambda model: logits(model, held_out))
        labels = held_out(row.base.arch["image_size"]).labels
        return runs.accuracy(log_probs, labels), -F.nll_loss(log_probs, labels).item()

    @functools.cache
    def cost(*used):
        batches = [test(model.arch["image_size"]).images[:args.batch].to(device) for model in used]
        predict = functools.partial(runs.predict, batch=args.batch)
        return measure(used, lambda: [predict(m, x).cpu() for m, x in zip(used, batches)], device)

    results, answers, rows, sizes = [], [], plan(args, models, quality), file_bytes(args, models)
    for row in rows:
        log_probs = prt.mixture(row.base, row.rewards, logits)
        used = [row.base, *(model for _, model in row.rewards)]
        seconds, mib, _ = cost(*used)
        results.append(dict(method=row.method, beta=row.beta, top1=runs.accuracy(log_probs, data.labels),
                            nll=F.nll_loss(log_probs, data.labels).item(),
                            kl=prt.kl(log_probs, logits(row.kl_base)).mean().item(),
                            ms=1000 * seconds / min(args.batch, len(data.labels)), mib=mib,
                            bytes=sum(sizes.get(model, 0) for model in used) if sizes else None))
        answers.append(log_probs.argmax(-1))
    distance = models.ref and prt.kl(logits(models.ref).log_softmax(-1), logits(models.base)).mean().item()
    about = dict(data=name, images=len(data.labels), kl_of_bases=distance) | how_chosen(args, models, "top-1")
    print_table(args, device, results, about)
    if args.picture:
        with files.atomic(args.picture) as f:
            draw_picture(data, answers[0], answers[1]).save(f, "PNG")
        print(f"{args.picture}: the upper answer is of the base alone, the lower of {rows[1].method}")


def draw_picture(data, *answers, columns=8, rows=4, cell=120):
    """Returns a grid of random test images, with the models' answers [N] below: right ones are green."""
    n = min(columns * rows, len(data.labels))
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:n].tolist()
    sheet = Image.new("RGB", (columns * cell, math.ceil(n / columns) * (cell + 30)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for position, i in enumerate(chosen):
        x, y = position % columns * cell, position // columns * (cell + 30)
        image = Image.fromarray(data.images[i].permute(1, 2, 0).numpy())  # [3, S, S] -> [S, S, 3]
        sheet.paste(image.resize((cell - 6, cell - 6), Image.BICUBIC), (x + 3, y + 3))
        for line, answer in enumerate(answers):
            name, right = data.classes[answer[i]], answer[i] == data.labels[i]
            while pen.textlength(name, font) > cell - 6:
                name = name[:-2] + "…"
            pen.text((x + 4, y + cell - 2 + 14 * line), name, "green" if right else "red", font)
    return sheet


# Text

def language(args, device, models):
    """Prints the table of text, or those of lm_eval's tasks, or the answers to one prompt."""
    info, end = models.rewards[0].info, models.rewards[0].arch["end"]
    names = (*args.reward, args.base, args.ref, args.tuned, args.oracle)
    named = {name: model for name, model in zip(names, (*models.rewards, *models[1:])) if model}
    tokenizer, data = weights.same_vocabulary(named), args.data or info["data"]
    room = min(model.arch["positions"] for model in named.values())

    def to_prompt(question):
        return tokenizer.begin + tokenizer.encode(info["template"].replace("{}", question))

    def respond(row, prompts):
        if not all(prompts):
            raise ValueError(f"{data}: contains an empty prompt, which cannot be continued")
        return generate_answers(args, device, row, prompts, end, room)

    @functools.cache
    def held_out():
        trained, share = info["args"], held_out_share(args, models)
        _, examples = text.load(info["data"], "train")
        train = text.encode(examples, tokenizer, end, trained["length"], trained["drop"])
        return batches(train, runs.hold_out(len(train.ids), share)[1][:args.limit], args.batch)

    rows = plan(args, models, lambda row: -runs.score_texts(row.base, row.rewards, held_out())["nll"])
    if args.prompt:
        prompt = to_prompt(args.prompt)
        for row in rows[:2]:
            answer = respond(row, [prompt])[0]
            print(f"{row.method}:{colored(rows[1], prompt, answer, tokenizer, device)}\n")
    elif args.tasks:
        task_tables(args, device, models, rows, tokenizer, end, room)
    else:
        text_table(args, device, models, rows, data, respond, tokenizer, end, room)


def batches(data, i, size):
    """Returns the batches of the examples i of Tokens, collated by similar lengths."""
    return [text.collate(data, i[part]) for part in text.by_length([data.ids[k] for k in i], size)]


def text_table(args, device, models, rows, name, respond, tokenizer, end, room):
    """Prints the table for text: exact match of generated answers, and NLL and KL of reference answers."""
    is_own_file = args.data and Path(name).is_file()
    examples = text.load(name, "train" if is_own_file else "test")[1][:args.limit]
    prompts = [text.token_ids(parts[:-1], tokenizer, end)[0] for _, parts in examples]
    truth = [final_number(parts[-1][0]) for _, parts in examples]
    data = text.encode(examples, tokenizer, end, room)
    test_batches = batches(data, torch.arange(len(data.ids)), args.batch)
    score = functools.partial(runs.score_texts, batches=test_batches)
    results, sizes = [], file_bytes(args, models)
    for row in rows:
        used = [row.base, *(model for _, model in row.rewards)]
        # With --compile, all of it runs twice: every batch size and length is compiled before it is measured.
        seconds, mib, answers = measure(used, lambda r=row: respond(r, prompts), device, int(args.compile))
        numbers = [final_number(tokenizer.decode(answer, first=False)) for answer in answers]
        form = statistics.mean(x is not None for x in numbers)
        exact = statistics.mean(x is not None and x == y for x, y in zip(numbers, truth))
        # KL is measured from row.kl_base: another base is written as row.kl_base plus (base - row.kl_base).
        rewards = row.rewards if row.base is row.kl_base else [(1.0, row.base), (-1.0, row.kl_base)]
        results.append(dict(method=row.method, beta=row.beta, form=form, exact=exact,
                            error=math.sqrt(exact * (1 - exact) / len(answers)),
                            **score(row.kl_base, rewards),
                            speed=sum(len(answer) + 1 for answer in answers) / seconds, mib=mib,
                            bytes=sum(sizes.get(model, 0) for model in used) if sizes else None))
    distance = models.ref and score(models.base, [(1.0, models.ref), (-1.0, models.base)])["kl"]
    about = dict(data=name, examples=len(examples), kl_of_bases=distance) | how_chosen(args, models, "NLL")
    print_table(args, device, results, about)


def task_tables(args, device, models, rows, tokenizer, end, room):
    """Prints a table for each task of lm-evaluation-harness: its metrics and their standard errors."""
    with files.explain("--tasks needs lm-evaluation-harness: pip install lm_eval", ImportError):
        from models import harness
    template = args.apply_chat_template and models.rewards[0].info["template"]
    mixtures = (harness.Mixture(
        tokenizer, template, end, room,
        score=functools.partial(runs.score_examples, row.base, row.rewards, batch=args.batch),
        generate=functools.partial(generate_answers, args, device, row)) for row in rows)
    scores = [*harness.evaluate(mixtures, args.tasks, args.limit)]
    results = [dict(method=row.method, beta=row.beta, tasks=x) for row, x in zip(rows, scores)]
    tables = {task: [dict(method=x["method"], beta=x["beta"]) | x["tasks"][task] for x in results]
              for task in scores[0]}
    about = dict(lm_eval=harness.lm_eval.__version__, examples=args.limit or "all", kl_of_bases=None)
    print_table(args, device, results, about | how_chosen(args, models, "NLL"), tables)


def final_number(answer):
    """Returns the number in an answer of GSM8K's format, such as "#### 1,234", or None."""
    match = NUMBER.search(answer)
    return float(match[1].replace(",", "")) if match else None


def generate_answers(args, device, row, prompts, end, room, until=(), to_text=None, **changed):
    """Returns the answers (ids) of a row's models to prompts (ids), in batches of similar lengths.

    until, to_text: as in decode.stopping; answers may go on after a stop string. changed: values of flags
    that replace those in args.
    """
    args = argparse.Namespace(**vars(args) | changed)
    longest = max(map(len, prompts))
    length = args.new_tokens or max(1, min(256, room - longest))
    if longest + length > room:
        raise ValueError(f"a prompt of {longest} and {length} tokens (--new-tokens) exceed {room} positions")
    generator = torch.Generator(device).manual_seed(args.seed)
    answers = [None] * len(prompts)
    for batch in tqdm(text.by_length(prompts, args.batch), desc="generate", disable=None, leave=False):
        T = len(prompts[batch[-1]])
        pad = [T - len(prompts[i]) for i in batch]
        ids = torch.tensor([[end] * n + prompts[i] for n, i in zip(pad, batch)], device=device)  # [B, T]
        pad = torch.tensor(pad, device=device) if any(pad) else None
        generate = decoder(args, row, generator, end, until, to_text)
        new = generate(row.base, row.rewards, ids, length=length, end=end, pad=pad)[:, T:].tolist()
        for i, ids in zip(batch, new):
            answers[i] = ids[:ids.index(end)] if end in ids else ids
    return answers


def decoder(args, row, generator, end, until, to_text):
    """Returns a function with the arguments of prt.generate that decodes one batch as the flags say.

    until, to_text: as in decode.stopping, which --speculative does without.
    """
    if args.speculative and row.rewards:  # a base alone has nothing to draft with
        return functools.partial(decode.speculative, temperature=args.temperature, top_p=args.top_p,
                                 generator=generator, drafter=row.drafter, compile=args.compile)
    draw = decode.sampler(args.temperature, args.top_p, generator)
    if any(until):
        draw = decode.stopping(draw, until, to_text, end)
    return functools.partial(decode.compiled if args.compile else prt.generate, draw=draw)


@torch.no_grad()
def colored(row, prompt, answer, tokenizer, device):
    """Returns the answer's text; the farther the row's rewards move a token (KL), the redder it is."""
    ids = torch.tensor([prompt + answer], device=device)
    logits = {policy: policy.head(policy.features(ids)[0, len(prompt) - 1:-1])  # [N, V]
              for _, policy in [(1.0, row.base), *row.rewards]}
    kls = prt.kl(prt.mixture(row.base, row.rewards, logits.get), logits[row.base]).tolist()
    plain = "NO_COLOR" in os.environ or not sys.stdout.isatty()
    output, largest, utf8 = "", 0.0, codecs.getincrementaldecoder("utf-8")("replace")
    for token, kl in zip(answer, kls):
        piece, largest = utf8.decode(tokenizer.bytes[token]), max(largest, kl)
        if piece:  # a character may need several tokens
            color = next((color for limit, color in SHADES if largest >= limit), None)
            output += piece if plain or color is None else f"\033[48;5;{color}m\033[30m{piece}\033[0m"
            largest = 0.0
    return output + utf8.decode(b"", final=True)


# Tables

def measure(models, work, device, repeats=5):
    """Returns (seconds, MiB, result) of work() with these models. MiB is None on a CPU.

    work: its result is on the CPU, so that the device is synchronized when it returns.
    seconds: the median of `repeats` calls after a warm-up call, or the time of one call if repeats is 0. MiB:
    the models' weights plus the peak memory that work() allocates.
    """
    cuda, seconds = device.type == "cuda", []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    size = sum(t.nbytes for model in set(models) for t in (*model.parameters(), *model.buffers()))
    mib = (size + torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    return statistics.median(seconds[1:] or seconds), mib, result


def print_table(args, device, results, about, tables=None):
    """Prints the results, one dict for each row, and writes them to --json.

    tables: title -> results of a table, if they are not one table.
    """
    cuda = device.type == "cuda"
    about |= dict(base=args.base, batch=args.batch, device=torch.cuda.get_device_name() if cuda else
                  f"CPU ({torch.get_num_threads()} threads)", dtype="bfloat16" if cuda else "float32",
                  torch=torch.__version__)
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items() if k != "kl_of_bases"))
    for title, table in (tables or {"": results}).items():
        print_rows(title, table)
    if about["kl_of_bases"] is not None:
        print(f"KL(source base || base): {about['kl_of_bases']:.4f} nats. The smaller it is, the more "
              "similar the effect of a reward on both (Prop. 3.2)")
    if args.json:
        with files.atomic(args.json) as f:
            f.write(json.dumps(about | dict(rewards=args.reward, rows=results), indent=1).encode())


def print_rows(title, results):
    """Prints a header and a line for each of the results; keys that are not in COLUMNS are lm_eval's."""
    width = max(len(title), *(len(result["method"]) for result in results))
    columns = {k: COLUMNS.get(k, ("std. err." if "_stderr," in k else k.removesuffix(",none"), "{:.4f}"))
               for k, x in results[0].items() if k not in ("method", "beta") and x is not None}
    widths = {k: max(10, len(name) + 2) for k, (name, _) in columns.items()}
    print(f"{title:{width}}  {'beta':>5}" + "".join(f"{columns[k][0]:>{n}}" for k, n in widths.items()))
    for result in results:
        beta = "" if result["beta"] is None else f"{result['beta']:g}"
        cells = "".join(f"{columns[k][1].format(result[k]):>{n}}" for k, n in widths.items())
        print(f"{result['method']:{width}}  {beta:>5}{cells}")


if __name__ == "__main__":
    runs.main(main)
