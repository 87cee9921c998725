"""Tunes a reward on text.

python train_lm.py                                          two small GPTs and a reward, from nothing
python train_lm.py --data gsm8k --base Qwen/Qwen2.5-0.5B    the paper's recipe, one GPU
python train_lm.py --data tulu.jsonl --length 4096          your own file (data/text.py names the forms)
python train_lm.py --data gsm8k --method ft                 fine-tuning: EFT's ingredient, or the upper line
python train_lm.py --data book.txt --method pretrain        a base of one's own
torchrun --nproc_per_node=8 train_lm.py --data gsm8k --accum 2
"""
import argparse
import contextlib
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import prt
from data import text
from models import weights
from models.gpt import GPT
from models.tokenizer import Tokenizer

PAPER = dict(method="prt", base="Qwen/Qwen2.5-0.5B", epochs=2, batch=128, lr=2e-5, weight_decay=0.0, accum=16,
             length=1024)
SCRATCH = dict(method="pretrain", size="new", steps=1000, batch=64, lr=3e-3, weight_decay=0.1, accum=1,
               length=65)
# Weight decay keeps the reward quiet about facts: what the base knows already needs no reward, and fades.
TUNE = dict(PAPER, data="arithmetic", steps=900, batch=64, lr=3e-3, weight_decay=1.0, accum=1)
DEMO = dict(old=dict(SCRATCH, data="arithmetic-old", size="old", steps=500),
            new=dict(SCRATCH, data="arithmetic-new"), reward=dict(TUNE, base="old"),
            tuned=dict(TUNE, base="old", method="ft"),
            oracle=dict(TUNE, base="new", method="ft", steps=300, lr=1e-3, weight_decay=0.0))
OLD = dict(family="llama", width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp=168, positions=256,
           eps=1e-5, tied=False, rope=dict(theta=10000.0))
SIZES = dict(old=OLD, new=OLD | dict(width=96, layers=3, head_width=24, mlp=256),
             large=OLD | dict(width=256, layers=8, head_width=64, mlp=688))
TOKENIZER = Path(text.__file__).with_name("tokenizer.json")


def parse():
    p = prt.arguments(__doc__)
    p.add_argument("--data", default="arithmetic", help="name, file or folder (data/text.py lists them)")
    p.add_argument("--reward-init", help="start the reward from this model, not from the base")
    p.add_argument("--size", choices=SIZES, help="of the GPT that --method pretrain makes without --base")
    p.add_argument("--epochs", type=prt.positive(float), help="passes over the data, unless --steps is given")
    p.add_argument("--length", type=prt.positive(int), help="the most tokens of an example")
    p.add_argument("--drop", action="store_true", help="drop longer examples instead of cutting them")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, slower")
    p.add_argument("--chunk", type=prt.positive(int), default=512, help="targets with logits at a time")
    p.add_argument("--out", help="checkpoint to write; for the run without --base and --method, a folder")
    return p.parse_args()


def main():
    args = parse()
    device = prt.setup(args.device)

    def own(recipe):
        """The recipe, less its number of steps where --epochs decides."""
        return {k: v for k, v in recipe.items() if k != "steps" or not args.epochs}

    if args.data != "arithmetic" or args.method or args.base is not None:
        given = {k: v for k, v in vars(args).items() if v is not None}
        out = f"out/{Path(args.data).name}-{args.method or 'prt'}.pt"
        recipe = own(SCRATCH if args.method == "pretrain" else PAPER) | dict(out=out)
        return train(argparse.Namespace(**vars(args) | recipe | given), device)
    folder = args.out or f"out/arithmetic-{args.seed}"
    recipes = {name: own(recipe) for name, recipe in DEMO.items()}
    paths = weights.stages(recipes, args, folder, lambda run: train(run, device))
    print("\npython eval.py --reward {reward} --base {new} --tuned {tuned} --ref {old} "
          "--oracle {oracle}".format(**paths))


def start(args, device):
    """(policy to train, frozen base or None, tokenizer, end token's id), on the device."""
    with weights.alone():
        if args.base is not None:
            base = weights.load(args.base, "base", text=True, dtype=prt.frozen_dtype(device))
            init = args.reward_init or args.base
            policy = weights.load(init, text=True)
            tokenizer = weights.same_vocabulary({f"--base {args.base}": base, f"reward of {init}": policy})
        else:
            tokenizer, base = Tokenizer(TOKENIZER.read_text(), str(TOKENIZER)), None
            policy = GPT(SIZES[args.size] | dict(vocab=tokenizer.size, end=tokenizer.size - 1)).eval()
            policy.info = dict(tokenizer=tokenizer.text)
    policy.arch["end"] = (base or policy).arch["end"]
    if policy.arch["end"] is None:
        raise ValueError(f"{args.base}: its config.json names no eos_token_id, which ends every response")
    base = None if args.method == "pretrain" else base.to(device).requires_grad_(False)
    return policy.to(device), base, tokenizer, policy.arch["end"]


def shard(model, dtype):
    """FSDP2: every process holds its part of the weights, and whole ones for a block at a time."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=precision)
    fully_shard(model, mp_policy=precision)


def train(args, device):
    """One run: data, base, reward, fit, score."""
    state = weights.unfinished(args)
    torch.manual_seed(args.seed)
    template, examples = text.load(args.data, "train")
    policy, base, tokenizer, end = start(args, device)
    policy.recompute = args.recompute
    if base is None:
        data = text.blocks(examples, tokenizer, end, args.length)
    else:
        data = text.encode(examples, tokenizer, end, args.length, args.drop)
    longest, room = max(map(len, data.ids)) - 1, min(m.arch["positions"] for m in (policy, base or policy))
    if longest > room:
        raise ValueError(f"an example has {longest} tokens, the model {room} positions: lower --length")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        for model in filter(None, (policy, base)):
            shard(model, prt.frozen_dtype(device))
    steps = args.steps or math.ceil(args.epochs * len(data.ids) / args.batch)
    indices = text.batches([len(ids) for ids in data.ids], args.batch, steps, args.seed)
    parts = [part for step in range(min(steps, 100)) for part in indices(step).chunk(world * args.accum)]
    print(f"{len(data.ids)} examples, {steps} steps, {text.padding(data, parts):.1%} padding")
    header = dict(kind="gpt", arch=policy.arch, tokenizer=tokenizer.text, template=template, data=args.data,
                  args=weights.settings(args))
    if base:
        header |= dict(method=args.method, beta=args.beta, source=args.base)

    def fetch(i, generator):
        return *text.collate(data, i, device), None

    warmup = round(0.03 * steps) if args.warmup is None else args.warmup
    prt.fit(policy, indices, fetch, base=base, steps=steps, warmup=warmup, decay="linear", head=GPT.head,
            chunk=args.chunk, state=state, name=Path(args.out).stem,
            save=lambda done: weights.save(args.out, header | done), **prt.options(args))

    with contextlib.suppress(FileNotFoundError):  # there may be no test split
        test = text.encode(text.load(args.data, "test")[1], tokenizer, end, room)
        tested = [text.collate(test, i, device) for i in torch.arange(len(test.ids)).split(32)]
        rows = {args.out: (policy, [])}
        if base:  # fine-tuning's reward is policy - base, so that the sum is the policy
            rewards = [(1.0, policy)] + [(-1.0, base)] * (args.method == "ft")
            rows = {args.base: (base, []), args.out: (base, rewards)}
        for name, (model, rewards) in rows.items():
            print(f"{name}: " + "NLL {nll:.3f} per token, {accuracy:.2%} of the tokens".format(
                **prt.score(model, rewards, tested)))


if __name__ == "__main__":
    prt.run(main)
