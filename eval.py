"""Adds a reward to a base, and prints a table of scores or answers to a prompt.

python eval.py --run out/shapes-0                    the models that a training script made without flags
python eval.py --reward reward.pt --base laion/CLIP-ViT-B-16-laion2B-s34B-b88K --beta 0.5 1 2
python eval.py --reward reward.pt --base new.pt --tuned-source ft.pt --tuned-base new_ft.pt --picture grid.png
python eval.py --reward reward.pt --base new.pt --beta 1 auto      and beta chosen on held-out examples
python eval.py --reward out/gsm8k-prt.pt --base Qwen/Qwen2.5-7B --limit 200
python eval.py --reward reward.pt --base Qwen/Qwen2.5-7B --prompt "Where does a reward go?"
python eval.py --reward reward.pt --base Qwen/Qwen2.5-7B --tasks gsm8k ifeval hellaswag

With --speculative the rewards draft together with their source, or the first reward alone if that is not
found. In the row of EFT, the model in --tuned-source drafts.

Columns of the table: top1, the share of images with the right class first; form and exact, the shares of
generated answers with a number after ####, and with the right one (error: its standard error); nll, of the
right class or tokens, and kl, from the row's base, in nats; accuracy, of single tokens; ms and speed, see
data/README.md; mib, memory on a GPU; bytes, of the files of rewards.
"""
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import prt
from data import files
from models import flags, runs, scores, weights

REMEDY = "lower --batch, take a smaller --base, or compute on the CPU (--device cpu)"
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # that --beta auto chooses from
# Column of the table and key of --json (data/README.md says what they are) -> format of its values.
COLUMNS = dict(top1="{:.2%}", form="{:.1%}", exact="{:.1%}", error="{:.1%}", nll="{:.3f}", accuracy="{:.1%}",
               kl="{:.3f}", ms="{:.3f}", speed="{:.0f}", mib="{:.1f}", bytes="{:,}")
# What is asked for -> the flags that have an effect on it, beside those of the models.
DECODING = {"batch", "limit", "seed", "speculative", "compile"}
ANSWERS = DECODING | {"new_tokens", "temperature", "top_p"}
ACTS = dict(images={"data", "batch", "json", "picture", "answers"},
            text=ANSWERS | {"data", "json", "answers"},
            prompt=ANSWERS - {"batch", "limit"} | {"prompt", "chat_template", "answers"},
            prompts=ANSWERS - {"limit"} | {"prompts", "chat_template", "answers"},
            tasks=DECODING | {"tasks", "chat_template", "json"})
BEGIN = time.perf_counter()
DEFAULTS = dict(batch=128, temperature=0.0, top_p=1.0, seed=0)


def parse(argv=None):
    """Returns the arguments of a command line."""
    p = flags.parser(__doc__)
    models, table, answers = (p.add_argument_group(name) for name in ("models", "table", "answers to text"))
    models.add_argument("--run", help="folder of a training run without flags: sets the next five flags")
    models.add_argument("--reward", nargs="+", help="reward checkpoints; several are added up")
    models.add_argument("--base", help="base to add the reward to: checkpoint, folder, Hub id, or "
                        "net.py:new (images)")
    models.add_argument("--source", help="what the reward was trained on (default: as stored in it)")
    models.add_argument("--tuned-source", help="fine-tuned source (--method ft): adds a row for EFT, and "
                        "one for the change of its weights, if all of the base's have the same shapes")
    models.add_argument("--tuned-base", help="fine-tuned base (--method ft): adds a row for it")
    models.add_argument("--beta", nargs="+", type=beta, help="divides the reward: smaller adds more; one row "
                        "each (default: that of training); auto: the best on held-out training data")
    table.add_argument("--data", help="test data (default: the data set of the reward)")
    table.add_argument("--tasks", nargs="+", help="score on these tasks of lm-evaluation-harness (or .yaml "
                       "files) instead: pip install lm_eval")
    table.add_argument("--chat-template", action="store_true", help="put the prompts of --tasks and --prompt "
                       "into the form of the reward's conversations in training, or else that of --base")
    table.add_argument("--limit", type=flags.positive(int), help="text: only so many examples (of each task)")
    table.add_argument("--batch", type=flags.positive(int), help="batch size (default: 128), or 4 "
                       "with --speculative")
    table.add_argument("--json", help="write the table to this file")
    table.add_argument("--answers", help="write every example with each row's answer to this .jsonl file")
    table.add_argument("--picture", help="images: .png of both answers (default with --run: RUN/picture.png)")
    table.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    answers.add_argument("--prompt", help="prompt to answer without and with the reward, instead of a table")
    answers.add_argument("--prompts", help="the same for each line of a .txt file, or each row of a .jsonl "
                         'file, which has a "prompt" or "messages"; a "response", or a last message of the '
                         "assistant, goes to --answers as the reference")
    answers.add_argument("--new-tokens", type=flags.positive(int), help="per answer, at most (default: 256)")
    answers.add_argument("--temperature", type=flags.number(float, lambda x: x == 0 or 1e-6 <= x <= 1e6,
                         "0, or from 1e-6 to 1e6"), help="0: no sampling (default: 0)")
    answers.add_argument("--top-p", type=flags.number(float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
                         help="sample from the fewest tokens with this probability in total (default: 1)")
    answers.add_argument("--seed", type=flags.from_0(int), help="random seed (default: 0)")
    answers.add_argument("--speculative", action="store_true",
                         help="faster: small models draft tokens, and the base checks several in one pass")
    answers.add_argument("--compile", action="store_true", help="torch.compile, with CUDA graphs on CUDA")
    args = flags.parsed(p, argv)
    if args.run:
        use_run(args)
    if not (args.reward and args.base):
        p.error(f"needs --reward and --base, or reward.pt and new.pt in the folder --run {args.run or ''}")
    outputs = dict(json=".json", picture=".png", answers=".jsonl")
    for flag, suffix in outputs.items():  # no other file is overwritten
        name = getattr(args, flag) or suffix
        folder = next((x for x in Path(name).absolute().parents if x.exists()), Path("."))
        if not name.endswith(suffix) or Path(name).is_dir() or not os.access(folder, os.W_OK):
            p.error(f"--{flag} {name}: must be the name of a file that can be written, and end in {suffix}")
    if args.top_p and not args.temperature:
        p.error("--top-p has no effect without a --temperature above 0")
    return args


def beta(text):
    return text if text == "auto" else flags.BETA(text)


def use_run(args):
    """Sets model flags that are not given to the files in --run that exist."""
    names = dict(reward="reward", base="new", source="old")
    for flag in ("reward", "base", "source", "tuned_source", "tuned_base"):
        name = names.get(flag, flag)
        path = Path(args.run) / f"{name}.pt"
        if getattr(args, flag) is None and path.exists():
            setattr(args, flag, [str(path)] if flag == "reward" else str(path))


def main():
    """Loads the models and prints what was asked for."""
    args = parse()
    device = runs.setup(args.device)
    models = load_models(args, device)
    is_text = models.rewards[0].info["kind"] == "gpt"
    check_flags(args, is_text)
    args = flags.filled(DEFAULTS | (dict(batch=4) if args.speculative else {}), args)
    if "auto" in (args.beta or []):
        held_out_share(args, models)  # raises an error before anything is computed
    if is_text:
        text_answers(args, device, models)
    else:
        image_table(args, device, models)


def check_flags(args, is_text):
    """Raises ValueError if a flag that is given has no effect, or would overwrite a part of what is read."""
    asked = next((k for k in ("prompt", "prompts", "tasks") if getattr(args, k) is not None), "text")
    asked = asked if is_text else "images"
    given = {flag for flag, x in vars(args).items() if x is not None and x is not False}
    given -= {"batch", "limit"} if asked in ("prompt", "prompts") and "auto" in (args.beta or []) else set()
    if idle := sorted(given & set().union(*ACTS.values()) - ACTS[asked]):
        what = dict(images=f"images ({args.reward[0]})", text="a table of text").get(asked, f"--{asked}")
        raise ValueError(f"--{idle[0].replace('_', '-')} has no effect on {what}: leave it out")
    inputs = [*args.reward, args.base, args.source, args.tuned_source, args.tuned_base, args.data]
    for output in filter(None, (args.json, args.picture, args.answers)):
        for path in filter(None, (*inputs, args.prompts)):
            if Path(output).resolve().is_relative_to(Path(path).resolve()):
                raise ValueError(f"{output} would overwrite a part of {path}: choose another name")


# Models and rows

class Models(NamedTuple):
    """The models that the table needs, on the device; None if they are not given."""

    rewards: list
    base: Any
    source: Any
    tuned_source: Any
    tuned_base: Any
    edited: Any = None  # the base with the weights base + (tuned source - source)

    def given(self):
        """Returns the list of all models that are not None."""
        return [model for model in (*self.rewards, *self[1:]) if model]


def load_models(args, device):
    """Returns the Models, each checked for its role; source is None if not found and not needed by a flag."""
    dtype = runs.frozen_dtype(device)
    reward = weights.load(args.reward[0], "prt", dtype=dtype, source=args.source)
    info, name = reward.info, args.source or reward.info["source"]
    is_text = info["kind"] == "gpt"
    rewards = {args.reward[0]: reward}  # a path that is given twice is loaded once
    for path in args.reward:
        rewards[path] = rewards.get(path) or weights.load(path, "prt", is_text, dtype, args.source)
    base = weights.load_base(args.base, info, dtype, device)
    tuned_source = args.tuned_source and weights.load(args.tuned_source, "ft", is_text, dtype, name)
    tuned_base = args.tuned_base and weights.load(args.tuned_base, "ft", is_text, dtype, args.base)
    try:
        source = base if name == args.base else weights.load_base(name, info, dtype, device)
    except OSError as error:
        if args.source or args.tuned_source:
            raise
        print(f"the rows of the source are left out; --source names it: {error}")
        source = None
    tuned = [(args.reward[0], reward, name, source), (args.tuned_source, tuned_source, name, source),
             (args.tuned_base, tuned_base, args.base, base)]
    for path, model, start, weights_now in tuned:
        if model and weights_now and model.info.get("source_sha256") != weights.fingerprint(weights_now):
            print(f"note: {path} was tuned from {model.info['source']}; {start} has other weights")
    edited = None
    if tuned_source:
        from models import task_vectors  # an optional file
        edited = task_vectors.edit(base, source, tuned_source, [args.base, name, args.tuned_source])
    models = Models([rewards[path] for path in args.reward], base, source, tuned_source, tuned_base, edited)
    need = sum(p.nbytes for model in {*models.given()} for p in model.parameters() if p.device != device)
    runs.check_memory(need, device, REMEDY)
    for model in models.given():
        model.to(device)
    return models


class Row(NamedTuple):
    """A row of the table: a base with (weight, model) rewards, as in prt.combine."""

    method: str
    beta: float | None
    base: Any
    rewards: list
    kl_base: Any  # the model that the row's KL is measured from
    drafter: Any = None  # of decode.speculative


def plan(args, models, quality):
    """Returns the rows of the table; quality: function from a Row to its score on held-out data."""
    rewards, base, source, tuned_source, tuned_base, edited = models

    def at_betas(method, terms, source=None):
        for beta in args.beta or [None]:
            if beta == "auto":
                row = max((tilted(method, base, terms, beta, source) for beta in BETAS), key=quality)
                yield row._replace(method=f"{method}, beta chosen")
            else:
                yield tilted(method, base, terms, beta, source)

    terms = [(model.info["beta"], 1, model) for model in rewards]
    rows = [Row("base alone", None, base, [], base)]
    for path, term in zip(args.reward, terms):
        name = path if len(rewards) > 1 else "reward"
        rows += at_betas(f"base + {name} (PRT)", [term], source)
    if len(rewards) > 1:
        rows += at_betas("base + sum of rewards", terms, source)
    if source:
        rows += [Row("source alone", None, source, [], source),
                 tilted("source + reward", source, terms[:1], None)]
    if tuned_source:
        trained = tuned_source.info["beta"]
        rows.append(Row("source fine-tuned", None, tuned_source, [], source))
        rows += at_betas("base + EFT", [(trained, 1, tuned_source), (trained, -1, source)])
    if edited:
        rows.append(Row("base + (tuned source - source) weights", None, edited, [], base))
    if tuned_base:
        rows.append(Row("base fine-tuned", None, tuned_base, [], base))
    return rows


def tilted(method, base, terms, beta, source=None):
    """Returns the Row of a base tilted at one beta, or by each reward at the beta that it was trained with.

    terms: (beta in training, sign, model); the reward of one is sign * beta in training * the model's logits,
    as in prt.reward. source: drafts for the base together with the rewards, or None.
    """
    rewards = [(sign * trained / (beta or trained), model) for trained, sign, model in terms]
    same = len({trained for trained, _, _ in terms}) == 1
    shown = beta or (terms[0][0] if same else None)
    return Row(method, shown, base, rewards, base, source and (source, rewards))


def held_out_share(args, models, examples=None):
    """Returns the share of the training split that was held out of training, for --beta auto to choose on.

    examples: model -> fingerprint of the training split as it is now, or None. Raises ValueError unless the
    same share of the same data was held out for all rewards and --tuned-source, and these are the data.
    """
    trained = [model for model in (*models.rewards, models.tuned_source) if model]
    splits = [(x.info["data"], *(x.info.get("args", {}).get(k) for k in ("hold_out", "length", "drop")))
              for x in trained]
    for path, model, split in zip((*args.reward, args.tuned_source), trained, splits):
        if split != splits[0] or not split[1]:
            raise ValueError(f"--beta auto: {path} was trained with --data {split[0]} --hold-out "
                             f"{split[1] or 0:g}; all rewards and --tuned-source need the same data, the same"
                             " --hold-out above 0, and for text the same --length and --drop")
        if examples and model.info.get("examples") != examples[model]:
            raise ValueError(f"--beta auto: {path} was trained on other examples than are now in {split[0]}, "
                             "so that it is unknown which were held out")
    return splits[0][1]


def how_chosen(args, models, score):
    """Returns the table's entry on --beta auto, if it is given; score: what beta was chosen by."""
    if "auto" not in (args.beta or []):
        return {}
    return {"beta chosen by": f"{score} of the {held_out_share(args, models):.0%} of training data held out"}


def trained_models(args, models):
    """Returns the (path, model) pairs of all models but the bases that are given."""
    paths = (*args.reward, args.tuned_source, args.tuned_base)
    pairs = zip(paths, (*models.rewards, models.tuned_source, models.tuned_base))
    return [(path, model) for path, model in pairs if model]


def file_bytes(args, models):
    """Returns model -> bytes of what a base needs for its rows, its file; {} unless the files mix kinds."""
    sizes = {model: os.path.getsize(path) for path, model in trained_models(args, models)}
    kinds = {"lora" if "lora" in model.info else model.info.get("ticket", {}).get("kind") for model in sizes}
    if models.edited:
        sizes[models.edited] = sizes[models.tuned_source]
    return sizes if len(kinds) > 1 else {}


# Images

def image_table(args, device, models):
    """Prints the table of images, and draws the picture."""
    from data import images
    from models import records
    info = models.rewards[0].info
    name, used = args.data or info["data"], models.given()
    tests = load_images(images, name, "test", used)
    data = tests[models.rewards[0]]
    for path, model in trained_models(args, models):
        classes = model.info["classes"]
        if classes != data.classes:
            differ = [f"{a!r} and {b!r}" for a, b in zip(classes, data.classes) if a != b] + ["the numbers"]
            raise ValueError(f"{path} has {len(classes)} classes, --data {name} {len(data.classes)}: they "
                             f"must be the same, but {differ[0]} differ")

    # One pass of each model; every row of the table is arithmetic on these logits.
    logits = {model: scores.predict(model, tests[model].images, args.batch).cpu() for model in used}
    held_out_logits = {}
    if "auto" in (args.beta or []):
        train = load_images(images, info["data"], "train", used)
        labels = train[used[0]].labels
        share = held_out_share(args, models, {model: split.examples for model, split in train.items()})
        held_out = runs.hold_out(len(labels), share)[1]
        held_out_logits = {model: scores.predict(model, train[model].images[held_out], args.batch).cpu()
                           for model in used}

    def quality(row):
        log_probs = prt.combine(row.base, row.rewards, held_out_logits.get)
        means = scores.classification(log_probs, labels[held_out])
        return means["accuracy"], -means["nll"]

    results, scored, sizes = [], {}, file_bytes(args, models)  # scored: label of the row -> [N, L]
    batches = {model: tests[model].images[:args.batch].to(device) for model in used}
    for row in plan(args, models, quality):
        log_probs = prt.combine(row.base, row.rewards, logits.get)
        run = [row.base, *(model for _, model in row.rewards)]
        seconds, mib, _ = measure(
            run, lambda run=run: [scores.predict(m, batches[m], args.batch).cpu() for m in run], device)
        means = scores.classification(log_probs, data.labels)
        results.append(dict(method=row.method, beta=row.beta, top1=means["accuracy"], nll=means["nll"],
                            kl=prt.kl(log_probs, logits[row.kl_base]).mean().item(),
                            ms=1000 * seconds / min(args.batch, len(data.labels)), mib=mib,
                            bytes=sum(sizes.get(model, 0) for model in run) if sizes else None))
        scored[records.label(row)] = log_probs
    source, base = (logits.get(model) for model in (models.source, models.base))
    distance = None if source is None else prt.kl(source.log_softmax(-1), base).mean().item()
    about = dict(data=name, images=len(data.labels), kl_of_bases=distance) | how_chosen(args, models, "top-1")
    by_class = {row: records.accuracy_by_class(data, x) for row, x in scored.items() if args.json}
    print_table(args, device, results, about, accuracy_by_class=by_class)
    if args.answers:
        files.write_lines(args.answers, records.predictions(data, scored))
    if picture := args.picture or (args.run and str(Path(args.run) / "picture.png")):
        from models.picture import draw_picture
        with files.atomic(picture) as f:
            draw_picture(data, *(x.argmax(-1) for x in [*scored.values()][:2])).save(f, "PNG")
        print(f"{picture}: the upper answer is of the base alone, the lower of {results[1]['method']}")


def load_images(images, name, split, models):
    """Returns model -> the split at the model's own resolution."""
    sizes = dict.fromkeys(model.arch["image_size"] for model in models)
    data = {size: images.load(name, split, size) for size in sizes}
    return {model: data[model.arch["image_size"]] for model in models}


# Text

def text_answers(args, device, models):
    """Prints the table of text, or those of lm_eval's tasks, or the answers to prompts."""
    from data import text
    from models import answers
    from models.gpt import same_vocabulary
    info, base = models.rewards[0].info, models.base
    names = (*args.reward, args.base, args.source or info["source"], args.tuned_source, args.tuned_base)
    pairs = [(name, model) for name, model in zip(names, (*models.rewards, *models[1:])) if model]
    named = dict(pairs)
    tokenizer, room = same_vocabulary(named, args.base), min(x.arch["positions"] for x in models.given())
    for model in models.given():
        model.size = base.size
    for name, model in pairs:  # also those of a path that is given twice
        model.reads = named[name].reads
    chat, tokenizer, ends = conversation(args, models, tokenizer)
    how = answers.Decoding(args.batch, args.new_tokens, args.temperature, args.top_p, args.seed,
                           args.speculative, args.compile)
    if args.speculative and args.batch > 4:
        print(f"--speculative --batch {args.batch}: all rows of a batch advance as the one that keeps fewest "
              "drafts, which above 4 is often slower than without --speculative")
    held_out = []
    if "auto" in (args.beta or []):
        trained, examples = info["args"], text.load(info["data"], "train", info.get("chat"))[1]
        share = held_out_share(args, models, dict.fromkeys(models.given(), text.fingerprint(examples)))
        train = text.encode(examples, tokenizer, ends[0], trained.get("length", 1024), trained.get("drop"))
        held_out = text.batches(train, runs.hold_out(len(train.ids), share)[1][:args.limit], how.scored)
    rows = plan(args, models, lambda row: -scores.score_texts(row.base, row.rewards, held_out)["nll"])
    if args.prompt is not None or args.prompts:
        # Without the rows of the source and of tuned models, which --run sets unasked.
        others = [row.method for row in rows].index("source alone") if models.source else len(rows)
        if args.prompts:
            from data import prompts  # an optional file
            asked = prompts.read(args.prompts)
        else:
            asked = [("--prompt", [dict(role="user", content=args.prompt)], None)]
        answer_prompts(args, asked, [row for row in rows[:others] if row is rows[0] or row.rewards], how,
                       chat or info["template"], tokenizer, ends, room)
    elif args.tasks:
        form = args.chat_template and (chat or info["template"])
        task_tables(args, device, models, rows, how, tokenizer, ends, room, form)
    else:
        text_table(args, device, models, rows, how, tokenizer, ends, room)


def conversation(args, models, tokenizer):
    """Returns the chat template of the prompts or None, their Tokenizer, and the ids that end an answer.

    These are what ended an answer in the reward's training, if the base has that token, the end of the chat
    template, and the base's end tokens. The first one ends the reference answers.
    """
    from data import text
    from models.gpt import end_ids
    info, reads = models.rewards[0].info, models.rewards[0].reads
    end, own = models.rewards[0].arch["end"], end_ids(models.base.arch)
    if end is None:
        raise ValueError(f"{args.reward[0]}: has no end token, so that no answer would end")
    if reads is not None and (end >= len(reads) or reads[end] != end):  # it is not a token of the base
        end = None
    chat, ends = info.get("chat"), [end, *own]
    if chat or args.chat_template:
        from data import chat as chats  # an optional file
    if chat and args.tasks and not args.chat_template:
        chat = None
    elif args.chat_template and not chat and info["template"] in ("{}", text.GSM8K):  # not of messages
        chat = chats.read(args.base)
    if chat:
        tokenizer = chats.with_special(tokenizer)
        if len(ids := tokenizer.encode(chat["end"])) > 1:
            raise ValueError(f"{chat['end']}, the end of an answer in the chat template, is no token "
                             f"of {args.base}")
        ends = ids + ends if chat is info.get("chat") else ends + ids
    if not (ends := [i for i in dict.fromkeys(ends) if i is not None]):
        raise ValueError(f"{args.base}: no token ends an answer, neither its own nor that of the reward")
    if {*ends} != {*own}:
        print(f"answers end at {', '.join(tokenizer.decode([i]) for i in ends)}; {args.base} itself ends at "
              f"{', '.join(tokenizer.decode([i]) for i in own) or 'none'}")
    return chat, tokenizer, ends


def answer_prompts(args, asked, rows, how, form, tokenizer, ends, room):
    """Prints the answers of each row, and writes them to --answers.

    asked: (name for errors, messages, reference answer or None) each. form: a chat template, or a template
    with {}.
    """
    from data import text
    from models import answers, records
    texts, prompts = [], []
    for name, messages, _ in asked:
        with files.explain(name, ValueError):
            if isinstance(form, dict):
                from data import chat as chats  # an optional file
                parts = [(chats.asked(form, messages), False)]
            elif [message["role"] for message in messages] == ["user"]:
                parts = [(form.replace("{}", messages[0]["content"]), False)]
            else:
                from data import prompts as forms  # an optional file
                parts = forms.begun(messages, form)
            texts.append("".join(part for part, _ in parts))
            prompts.append(text.token_ids(parts, tokenizer, ends[0])[0])
            if not prompts[-1]:
                raise ValueError("an empty prompt cannot be continued")
    text.report_special([[(x["content"], False) for x in messages] for _, messages, _ in asked], tokenizer)
    written = [answers.generate(row, prompts, how, ends, room) for row in rows]
    for i, (_, messages, _) in enumerate(asked):
        if len(asked) > 1:
            print(f"{i + 1}. {messages[-1]['content']}\n")
        for row, each in zip(rows, written):
            shown = records.label(row) if len(rows) > 2 else row.method
            moved = row if row.rewards else rows[1]
            print(f"{shown}:{answers.colored(moved, prompts[i], each[i], tokenizer)}\n")
    if args.answers:
        labeled = dict(zip(map(records.label, rows), written))
        examples = [(name, [(x, False), (truth, True)]) for (name, _, truth), x in zip(asked, texts)]
        files.write_lines(args.answers, records.texts(examples, labeled, tokenizer))


def text_table(args, device, models, rows, how, tokenizer, ends, room):
    """Prints the table for text: exact match of generated answers, and NLL and KL of reference answers."""
    from data import text
    from models import answers
    info, kept = models.rewards[0].info, []  # kept: the answers (ids) of each row
    name = args.data or info["data"]
    is_own_file = args.data and Path(name).is_file()
    examples = text.load(name, "train" if is_own_file else "test", info.get("chat"))[1]
    if text.fingerprint(examples) == info.get("examples"):
        print(f"note: {args.reward[0]} was trained on these examples, but for those of --hold-out")
    examples = examples[:args.limit]
    prompts = [text.token_ids(parts[:-1], tokenizer, ends[0])[0] for _, parts in examples]
    if not all(prompts):
        raise ValueError(f"{name}: contains an empty prompt, which cannot be continued")
    truth = [answers.final_number(parts[-1][0]) for _, parts in examples]
    if 0 < (numbers := len(truth) - truth.count(None)) < len(truth):
        print(f"{numbers} of {len(truth)} reference answers have a number (####): only these count in exact")
    data = text.encode(examples, tokenizer, ends[0], room)
    batches = text.batches(data, torch.arange(len(data.ids)), how.scored)
    results, sizes, length = [], file_bytes(args, models), answers.new_tokens(prompts, how, room)
    parts = text.by_length(prompts, args.batch)
    for row in rows:
        run = [row.base, *(model for _, model in row.rewards)]
        # What compiles, or loads kernels (the first row on CUDA), runs once more before it is measured.
        again = args.compile or (device.type == "cuda" and row is rows[0])
        seconds, mib, written = measure(
            run, lambda row=row: answers.generate(row, prompts, how, ends, room), device, int(again))
        kept.append(written)
        # The end is looked for at every 8th step.
        steps = sum(min(length, 8 * (max(len(written[i]) for i in part) // 8 + 1)) for part in parts)
        results.append(dict(method=row.method, beta=row.beta,
                            **answers.exact_match(truth, written, tokenizer),
                            **scores.score_texts(row.base, row.rewards, batches, kl_base=row.kl_base),
                            ms=1000 * seconds / steps,
                            speed=sum(len(answer) + 1 for answer in written) / seconds, mib=mib,
                            bytes=sum(sizes.get(model, 0) for model in run) if sizes else None))
    distance = models.source and scores.score_texts(models.source, [], batches, kl_base=models.base)["kl"]
    about = dict(data=name, examples=len(examples), kl_of_bases=distance) | how_chosen(args, models, "NLL")
    print_table(args, device, results, about)
    if args.answers:
        from models import records
        labeled = dict(zip(map(records.label, rows), kept))
        files.write_lines(args.answers, records.texts(examples, labeled, tokenizer))


def task_tables(args, device, models, rows, how, tokenizer, ends, room, form):
    """Prints a table for each task of lm-evaluation-harness: its metrics and their standard errors.

    form: that of the prompts, as in harness.TiltedModel.
    """
    with files.explain("--tasks needs lm-evaluation-harness: pip install lm_eval", ImportError):
        from models import harness
    tilted_models = (harness.TiltedModel(row, tokenizer, form, ends, room, how) for row in rows)
    tasks = [*harness.evaluate(tilted_models, args.tasks, args.limit)]
    results = [dict(method=row.method, beta=row.beta, tasks=x) for row, x in zip(rows, tasks)]
    tables = {task: [dict(method=x["method"], beta=x["beta"]) | x["tasks"][task] for x in results]
              for task in tasks[0]}
    about = dict(lm_eval=harness.lm_eval.__version__, examples=args.limit or "all", kl_of_bases=None)
    print_table(args, device, results, about | how_chosen(args, models, "NLL"), tables)


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


def print_table(args, device, results, about, tables=None, **more):
    """Prints the results, one dict for each row, and writes them to --json, with `more` that is not printed.

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
        print(f"KL(source || base): {about['kl_of_bases']:.4f} nats. The smaller it is, the more similar the "
              "effect of a reward on both (Prop. 3.2)")
    if args.json:
        about |= runs.origin() | dict(seconds=time.perf_counter() - BEGIN, rewards=args.reward)
        with files.atomic(args.json) as f:
            f.write(json.dumps(about | more | dict(rows=results), indent=1).encode())


def print_rows(title, results):
    """Prints a header and a line for each of the results; keys that are not in COLUMNS are lm_eval's."""
    width = max(len(title), *(len(result["method"]) for result in results))
    columns = {k: COLUMNS.get(k, "{:.4f}") for k, x in results[0].items()
               if k not in ("method", "beta") and x is not None}
    widths = {k: max(10, len(k) + 2) for k in columns}
    print(f"{title:{width}}  {'beta':>5}" + "".join(f"{k:>{n}}" for k, n in widths.items()))
    for result in results:
        beta = "" if result["beta"] is None else f"{result['beta']:g}"
        cells = "".join(f"{columns[k].format(result[k]):>{n}}" for k, n in widths.items())
        print(f"{result['method']:{width}}  {beta:>5}{cells}")


if __name__ == "__main__":
    runs.main(main, REMEDY)
