"""Trains a reward on text.

python train_lm.py                                          two small GPTs and a reward, from scratch
python train_lm.py --data gsm8k --base Qwen/Qwen2.5-0.5B    the paper's recipe, one GPU
python train_lm.py --data tulu.jsonl --length 4096          your own file (data/text.py lists the formats)
python train_lm.py --data gsm8k --method ft                 fine-tuning: part of EFT, or the upper bound
python train_lm.py --data book.txt --method pretrain        a base of your own
torchrun --nproc_per_node=8 train_lm.py --data gsm8k --accum 2

--beta is the unit of the reward, which is beta times the network's logits (the paper's lambda). It cancels
out of the loss unless --alpha is set, the weight of the entropy of softmax(reward). Each process computes its
part of --batch in --accum micro-batches. --chunk is by default what an eighth of a GPU's memory holds.
"""
import contextlib
import math
from pathlib import Path

from models import flags

PAPER = dict(method="prt", base="Qwen/Qwen2.5-0.5B", epochs=2, batch=128, lr=2e-5, weight_decay=0.0, accum=16,
             length=1024)
SCRATCH = dict(method="pretrain", size="new", steps=1000, batch=64, lr=3e-3, weight_decay=0.1, accum=1,
               length=65)
# Weight decay removes facts from the reward: those that the base knows get no gradient, and decay.
TUNE = dict(PAPER, data="arithmetic", steps=900, batch=64, lr=3e-3, weight_decay=1.0, accum=1)
# The run without arguments: each stage is a run of this script.
STAGES = dict(old=dict(SCRATCH, data="arithmetic-old", size="old", steps=500),
              new=dict(SCRATCH, data="arithmetic-new"), reward=dict(TUNE, base="old"),
              tuned=dict(TUNE, base="old", method="ft"),
              oracle=dict(TUNE, base="new", method="ft", steps=300, lr=1e-3, weight_decay=0.0))
LLAMA = dict(rope=dict(theta=10000.0), eps=1e-5, layer_norm=False, gated_mlp=True, qkv_bias=False, bias=False)
OLD = LLAMA | dict(width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp=168, positions=256, tied=False)
SIZES = dict(old=OLD, new=OLD | dict(width=96, layers=3, head_width=24, mlp=256),
             large=OLD | dict(width=256, layers=8, head_width=64, mlp=688))
TOKENIZER = Path(__file__).with_name("data") / "tokenizer.json"


def parse():
    """Returns the command line's arguments."""
    p, run, recipe, machine = flags.training(__doc__, PAPER, SCRATCH, STAGES, "3%% of the steps")
    run.add_argument("--data", default="arithmetic", help="arithmetic, gsm8k, a .jsonl, .parquet, or .txt "
                     "file, or a folder with train.* and test.* (default: arithmetic)")
    run.add_argument("--reward-init", help="start the reward from a model, or random (default: --base)")
    run.add_argument("--size", choices=SIZES, help="size of the GPT to pretrain (default: new)")
    recipe.add_argument("--epochs", type=flags.positive(float), help="data passes if no --steps (default: 2)")
    recipe.add_argument("--length", type=flags.positive(int),
                        help="maximum number of tokens per example (default: 1024; pretrain: 65)")
    recipe.add_argument("--drop", action="store_true", help="drop longer examples instead of truncating them")
    machine.add_argument("--recompute", action="store_true", help="less memory by activation checkpointing")
    machine.add_argument("--chunk", type=flags.positive(int),
                         help="compute logits for this many targets at a time (default: 512 on a CPU)")
    return p.parse_args()


if __name__ == "__main__":
    parse()  # prints --help and rejects mistyped flags before the imports below, which take seconds

import torch

import prt
from data import files, text
from models import runs, weights
from models.gpt import GPT
from models.tokenizer import Tokenizer


def main():
    """Trains one model, or all of STAGES."""
    runs.launch(parse(), "arithmetic", PAPER, SCRATCH, STAGES, train)


def train(args, device, state):
    """Trains a base, a reward, or a fine-tuned model, and prints its scores on the test split."""
    template, examples = text.load(args.data, "train")
    policy, base, tokenizer, end = load_models(args, device)
    policy.recompute = args.recompute
    if base is None:
        data = text.blocks(examples, tokenizer, end, args.length)
    else:
        data = text.encode(examples, tokenizer, end, args.length, args.drop)
    room = min(model.arch["positions"] for model in (policy, base) if model)
    lengths = [len(ids) for ids in data.ids]
    if max(lengths) - 1 > room:
        raise ValueError(f"an example has {max(lengths) - 1} tokens, but the model has only {room} "
                         "positions: lower --length")
    used = len(runs.hold_out(len(lengths), args.hold_out)[0])
    steps = args.steps or math.ceil(args.epochs * used / args.batch)
    indices = text.group_by_length(runs.order(args, len(lengths)), lengths, args.batch, steps, args.seed)
    print(f"{used} of {len(lengths)} examples, {steps} steps")
    info = dict(kind="gpt", arch=policy.arch, tokenizer=tokenizer.text, template=template, data=args.data)
    if base:
        info |= dict(method=args.method, beta=args.beta, source=args.base)
        runs.initialize(args, policy, info, state)

    def fetch(i, generator):
        return *runs.to_device(text.collate(data, i), device), None

    chunk = args.chunk or runs.chunk_size(policy.arch["vocab"], device)
    prt.fit(policy, indices, fetch, decay="linear", head=GPT.head, chunk=chunk,
            **runs.fit_options(args, steps, round(0.03 * steps), policy, base, device, info, state))

    with contextlib.suppress(FileNotFoundError):  # there may be no test split
        test = text.encode(text.load(args.data, "test")[1], tokenizer, end, room)
        batches = [text.collate(test, i) for i in torch.arange(len(test.ids)).split(32)]
        rows = {args.out: (policy, [])}
        if base:  # the reward of fine-tuning is policy - base, so that the sum is the policy
            rewards = [(1.0, policy)] + ([(-1.0, base)] if args.method == "ft" else [])
            rows = {args.base: (base, []), args.out: (base, rewards)}
        for name, (model, rewards) in rows.items():
            print(f"{name}: " + "NLL {nll:.3f} per token, {accuracy:.2%} of the tokens".format(
                **runs.score_texts(model, rewards, batches, chunk)))


def load_models(args, device):
    """Returns the policy to train, the frozen base or None, the tokenizer, and the end token's id."""
    with files.lock():
        if args.base is not None:
            base = weights.load(args.base, "base", text=True, dtype=runs.frozen_dtype(device))
            start = args.base if args.reward_init in (None, "random") else args.reward_init
            policy = weights.load(start, text=True)
            tokenizer = weights.same_vocabulary({f"--base {args.base}": base, f"reward of {start}": policy})
        else:
            tokenizer, base = Tokenizer(TOKENIZER.read_text(), str(TOKENIZER)), None
            policy = GPT(SIZES[args.size] | dict(vocab=tokenizer.size, end=tokenizer.size - 1)).eval()
    policy.arch["end"] = end = (base or policy).arch["end"]
    if end is None:
        raise ValueError(f"{args.base}: its config.json names no eos_token_id, which ends every response")
    base = None if args.method == "pretrain" else base.to(device).requires_grad_(False)
    return policy.to(device), base, tokenizer, end


if __name__ == "__main__":
    runs.main(main)
