"""Trains a reward on text.

python train_lm.py                                          two small GPTs, a reward, and their table
python train_lm.py --data gsm8k                             the paper's recipe: Qwen2.5-0.5B, one GPU
python train_lm.py --data tulu.jsonl --length 4096          your own file (data/README.md lists the formats)
python train_lm.py --data gsm8k --method ft                 plain fine-tuning of the source, for EFT
python train_lm.py --data book.txt --method pretrain        a base of your own
torchrun --nproc_per_node=8 train_lm.py --data gsm8k

Without --data, --source, and --method it makes the five models of models/examples.py; other flags apply to
all of them, --reward-init to the reward alone. --beta is the unit of the reward, which is beta times the
network's logits (the paper's lambda). It cancels out of the loss unless --alpha is set, the weight of the
entropy of softmax(reward). Each process computes its part of --batch in --accum micro-batches, by default as
few as fit into a GPU's memory (models/memory.py), or on a CPU those of 8 examples. --chunk is by default what
an eighth of a GPU's memory holds.

The defaults suit public weights and thousands of examples. For 200: --epochs 10 --batch 16 --hold-out 0.2
--keep-best, and for a small network of your own a higher --lr, such as 1e-3. OUT.jsonl is the log of a run.
"""
import contextlib
import math

import torch

import prt
from data import text
from models import flags, runs, scores, watch, weights
from models.gpt import new_output_matrix, same_vocabulary

REMEDY = ("lower --length or --chunk, raise --accum, add --recompute, train --lora, or use more GPUs "
          "(torchrun)")
# Flag -> default, the paper's recipe. Pretraining and small rewards (masks, low-rank) change some of them.
PAPER = dict(data="arithmetic", method="prt", source="Qwen/Qwen2.5-0.5B", epochs=2, batch=128, accum=None,
             lr=2e-5, weight_decay=0.0, length=1024, beta=1.0, alpha=0.0, hold_out=0.0, seed=0)
RECIPES = dict(prt=PAPER, ticket=PAPER | dict(lr=1e-2, keep=0.5, freeze=0.0), lora=PAPER | dict(lr=2e-4),
               pretrain=PAPER | dict(source=None, size="new", steps=1000, batch=64, accum=1, lr=3e-3,
                                     weight_decay=0.1, length=65))


def parse(argv=None):
    """Returns the arguments of a command line; without one of --data, --source, and --method, as given."""
    p, run, recipe, machine = flags.training(__doc__, RECIPES, "3%% of the steps")
    run.add_argument("--data", help="arithmetic, gsm8k, a .jsonl, .parquet, or .txt file, or a folder with "
                     "train.* and test.* (default: arithmetic)")
    run.add_argument("--reward-init", help="start the reward as a copy of --source (copy), the same with a "
                     "new output matrix (head), with random weights (random), or as a model, by its path "
                     "(default: copy)")
    run.add_argument("--size", choices=("old", "new", "large"),
                     help="size of the GPT to pretrain (default: new)")
    recipe.add_argument("--epochs", type=flags.positive(float), help="data passes if no --steps (default: 2)")
    recipe.add_argument("--length", type=flags.positive(int),
                        help="maximum number of tokens per example (default: 1024; pretrain: 65)")
    recipe.add_argument("--chat-template", action="store_true", help="give conversations, or prompts and "
                        "responses, the form that --source was instruction-tuned with")
    recipe.add_argument("--drop", action="store_true", help="drop longer examples instead of truncating them")
    machine.add_argument("--recompute", action="store_true", help="less memory by activation checkpointing")
    machine.add_argument("--chunk", type=flags.positive(int),
                         help="compute logits for this many targets at a time (default: 512 on a CPU)")
    return flags.resolve(p, flags.parsed(p, argv), RECIPES, no_pretraining=["drop", "chat_template"])


def main():
    """Trains one model, or the five of the example."""
    args = parse()
    device = runs.setup(args.device)
    if args.method is None:
        from models import examples  # optional files are imported where they are needed
        examples.run(examples.TEXT, args, device, parse, train)
    else:
        with weights.run(args) as state:
            train(args, device, state)


def train(args, device, state):
    """Trains a reward, a fine-tuned model, or a base, and prints its scores on the test split.

    state: the checkpoint to continue from, or None.
    """
    torch.manual_seed(args.seed)
    chat = None
    if args.chat_template:
        from data import chat as chats  # an optional file
        chat = state["chat"] if state else chats.read(args.source)
    template, examples = text.load(args.data, "train", chat)
    fingerprint = text.fingerprint(examples)
    weights.check_same(args, state, dict(examples=fingerprint))
    if args.method == "pretrain":
        from models import pretrain
        model, tokenizer, end, data = pretrain.gpt(args, examples)
        source, info = None, {}
    else:
        model, source, tokenizer, end = load_models(args, chat)
        data = text.encode(examples, tokenizer, end, args.length, args.drop)
        info = dict(method=args.method, beta=args.beta, source=args.source,
                    source_sha256=weights.fingerprint(source))
    room = min(network.arch["positions"] for network in (model, source) if network)
    lengths = [len(ids) for ids in data.ids]
    if max(lengths) - 1 > room:
        raise ValueError(f"an example has {max(lengths) - 1} tokens, but the model has only {room} "
                         "positions: lower --length")
    test = None
    with contextlib.suppress(FileNotFoundError):  # there may be no test split
        test = text.encode(text.load(args.data, "test", chat)[1], tokenizer, end, room)
    used, held = runs.hold_out(len(lengths), args.hold_out)
    steps = args.steps or math.ceil(args.epochs * len(used) / args.batch)
    indices = runs.batches(len(lengths), args.hold_out, args.batch, args.seed)
    indices = text.group_by_length(indices, lengths, args.batch, steps, args.seed)
    flags.check_warmup(args, steps)

    # The reward model, which starts as a copy of the source.
    info |= dict(kind="gpt", arch=model.arch, tokenizer=tokenizer.text, template=template, data=args.data,
                 examples=fingerprint) | (dict(chat=chat) if chat else {})
    model.recompute = args.recompute
    if args.ticket or args.reward_init == "random":
        from models import tickets
        tickets.start(args, model, info, state)
    elif args.lora:
        from models import lora
        source = lora.start(args, model, info)  # the same modules, with what is trained left out
    if args.ticket or args.lora:
        info["tokenizer"] = tokenizer.hash  # the text may need more bytes than the rest of the file
    weights.check_same(args, state, info)
    if device.type == "cuda":
        from models import memory
        accum, chunk = memory.choose(args, max(lengths) - 1, model, None if args.lora else source, device)
    else:
        each, chunk = args.batch // runs.world_size(), args.chunk or 512
        accum = args.accum or each // max(n for n in range(1, 9) if each % n == 0)
    # The reward of fine-tuning is model - source, so that the sum is the model.
    rewards = [(1.0, model)] + ([(-1.0, source)] if args.method == "ft" else []) if source else []

    def score(tokens, i, rewards):
        batches = text.batches(tokens, i, tokens=8192)
        return scores.score_texts(source or model, rewards, batches, chunk)

    def fetch(i, generator):
        return *runs.to_device(text.collate(data, i), device), None

    # Algorithm 1
    frozen = runs.frozen_dtype(device)
    for network, dtype in (model, frozen if args.lora else torch.float32), (source, frozen):
        if network and not (args.lora and network is source):
            runs.place(network, device, dtype, dtype, args.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    said = dict(examples=f"{len(used)} of {len(lengths)}", tokens=sum(lengths), accum=accum, chunk=chunk)
    rows, hooks = watch.begin(args, info, model, optimizer, state, steps, said,
                              len(held) and (lambda: score(data, held, rewards)))
    history = prt.fit(
        model, indices, fetch, base=source, method=args.method if source else "prt", beta=args.beta,
        alpha=args.alpha, optimizer=optimizer, steps=steps, decay="linear",
        warmup=round(0.03 * steps) if args.warmup is None else args.warmup, accum=accum,
        seed=args.seed, head=lambda model, x: model.head(x), chunk=chunk, **hooks)
    watch.end(args, rows, history[-1]["step"], steps)

    if test:
        added = {args.source: [], args.out: rewards} if source else {args.out: rewards}
        found = {name: score(test, torch.arange(len(test.ids)), terms) for name, terms in added.items()}
        for name, means in found.items():
            print(f"{name}: " + "NLL {nll:.3f} per token, {accuracy:.2%} of the tokens".format(**means))
        if source:
            watch.compare(args, -found[args.source]["nll"], -found[args.out]["nll"])


def load_models(args, chat=None):
    """Returns the model to train, the frozen source, their tokenizer, and the end token's id.

    With --lora, both are one model. chat: as in data/chat.py, which has an end of its own.
    """
    begin = args.source if args.reward_init in (None, *flags.STARTS) else args.reward_init
    source = weights.load(args.source, "base", text=True, dtype=None).requires_grad_(False)
    model = source if args.lora else weights.load(begin, text=True, dtype=None)
    tokenizer = same_vocabulary({f"--source {args.source}": source, f"reward of {begin}": model})
    if args.reward_init == "head" and not args.lora:
        new_output_matrix(model, args.seed + 1)  # the source may have started from the numbers of args.seed
    end = source.arch["end"]
    if chat:
        from data import chat as chats
        tokenizer = chats.with_special(tokenizer)
        end, = tokenizer.encode(chat["end"])
    model.arch["end"] = end
    if end is None:
        raise ValueError(f"{args.source}: its config.json and generation_config.json name no eos_token_id, "
                         "which ends every response")
    return model, source, tokenizer, end


if __name__ == "__main__":
    runs.main(main, REMEDY)
