"""Command-line flags of the training scripts. Defaults are in the scripts' RECIPES, and nowhere else."""
import argparse
import math
import os
from pathlib import Path

from data import hub
from models import runs

# What --reward-init may be, besides the path of a model; "head" for text only.
STARTS = ("copy", "head", "random")


def parser(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def training(doc, recipes, warmup):
    """Returns the parser of a training script, and its groups "run", "recipe", and "machine" for more flags.

    recipes: name -> (flag -> default), for a reward and fine-tuning ("prt"), "ticket", "lora", "pretrain".
    warmup: the default of --warmup, in words.
    """
    def default(flag):
        reward = recipes["prt"].get(flag, "none")
        others = [f"; {name}: {recipe[flag] or 0}" for name, recipe in recipes.items()
                  if recipe.get(flag) not in (reward, None)]
        return f"(default: {'what fits' if reward is None else reward}{''.join(others)})"

    p = parser(doc)
    run, recipe, ticket, machine = (p.add_argument_group(name)
                                    for name in ("run", "recipe", "a reward in a small file", "machine"))
    run.add_argument("--source", help="checkpoint, folder, Hub id, or (images) net.py:old of the frozen "
                     f"model that the reward is trained on {default('source')}")
    run.add_argument("--method", choices=("prt", "ft", "pretrain"),
                     help="train a reward, a fine-tuned model, or a base, new or --source (default: prt)")
    run.add_argument("--out", help="checkpoint to write, or a folder for it (default: out/DATA-METHOD.pt); "
                     "that of five models if none of --data, --source, and --method is given (default: "
                     "out/DATA-SEED)")
    run.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
    run.add_argument("--seed", type=from_0(int), help=f"random seed {default('seed')}")
    recipe.add_argument("--steps", type=positive(int), help=f"training steps {default('steps')}")
    recipe.add_argument("--batch", type=positive(int), help=f"examples per step {default('batch')}")
    recipe.add_argument("--accum", type=positive(int), help="micro-batches of a step and process "
                        f"{default('accum')}")
    recipe.add_argument("--lr", type=positive(float), help=f"peak learning rate {default('lr')}")
    recipe.add_argument("--warmup", type=from_0(int), help=f"steps of linear warmup (default: {warmup})")
    recipe.add_argument("--weight-decay", type=from_0(float),
                        help=f"of AdamW; paper: 0 {default('weight_decay')}")
    recipe.add_argument("--beta", type=BETA, help=f"scale of the reward {default('beta')}")
    recipe.add_argument("--alpha", type=from_0(float), help=f"entropy bonus, eq. 12 {default('alpha')}")
    recipe.add_argument("--hold-out", type=from_0(float, below=1), help="share of the training split that "
                        "is not trained on: each save is scored on it, and eval.py --beta auto chooses on it "
                        f"{default('hold_out')}")
    run.add_argument("--keep-best", action="store_true", help="with --hold-out: keep the checkpoint with the "
                     "best held-out score in OUT.best.pt, too")
    ticket.add_argument("--ticket", choices=("random", "base"), help="train a mask over weights that are "
                        "random, or those of --source (default: none)")
    ticket.add_argument("--keep", type=positive(float, below=1), help="share of ones in the mask "
                        f"{default('keep')}")
    ticket.add_argument("--freeze", type=from_0(float, below=1), help="share of the mask that is random, "
                        f"which saves its bits {default('freeze')}")
    ticket.add_argument("--lora", type=positive(int), metavar="RANK", help="train low-rank changes of the "
                        "frozen --source instead of a whole model (default: none)")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    machine.add_argument("--compile", action="store_true", help="use torch.compile for the networks")
    return p, run, recipe, machine


def resolve(p, args, recipes, no_pretraining):
    """Returns the arguments with a recipe's defaults for flags that are not given; exits if flags contradict.

    no_pretraining: names of arguments without an effect on pretraining, besides those of the reward.
    Without --data, --source, and --method nothing but the built-in example is meant: they stay as they are.
    """
    if args.method in ("ft", "pretrain") and args.reward_init:
        p.error(f"--reward-init is for rewards, not for --method {args.method}")
    if args.keep_best and not args.hold_out:
        p.error("--keep-best needs examples that are not trained on: --hold-out 0.1")
    starts = (None, "copy", "head")  # of low-rank changes
    if args.lora and (args.ticket or args.method == "pretrain" or args.reward_init not in starts):
        p.error("--lora changes --source: it goes with neither --ticket, --method pretrain, nor another "
                "--reward-init than copy and head")
    if args.ticket or args.keep or args.freeze:
        from models import tickets
        tickets.check_flags(p, args)
    if args.method == "pretrain":
        idle = ["beta", "alpha", "reward_init", "keep_best", *no_pretraining]
        idle += ["size"] if args.source else []
    else:
        idle = ["size"]
    refuse(p, args, idle + (["epochs"] if args.steps else []), f"here (--method {args.method or 'prt'})")
    name = "ticket" if args.ticket else "lora" if args.lora else "prt"
    name = "pretrain" if args.method == "pretrain" else name
    if not (args.source or args.method) and args.data in (None, recipes["prt"]["data"]):
        if args.ticket or args.lora:
            p.error("--ticket and --lora need a --source, such as old.pt in the folder of a run without "
                    "flags")
        return args
    args = filled(recipes[name], args)
    if not args.out or args.out.endswith(os.sep) or Path(args.out).is_dir():
        args.out = str(Path(args.out or "out", f"{Path(args.data).name}-{args.method}.pt"))
    return args


def refuse(p, args, names, where):
    """Exits if one of these arguments is given, since it would do nothing."""
    for name in names:
        if getattr(args, name, None) not in (None, False):
            p.error(f"--{name.replace('_', '-')} has no effect {where}: leave it out")


def check_run(args, made=()):
    """Raises ValueError, before any work is done, if a run cannot go through.

    made: paths of models that other runs make before.
    """
    for name in {args.source, args.reward_init} - {None, *STARTS, *made}:
        hub.locate(name)
    if args.batch % ((args.accum or 1) * runs.world_size()):
        raise ValueError(f"--batch {args.batch} does not split into --accum {args.accum or 1} x "
                         f"{runs.world_size()} (processes)")
    if args.steps:
        check_warmup(args, args.steps)


def check_warmup(args, steps):
    if (args.warmup or 0) >= steps:
        raise ValueError(f"--warmup {args.warmup} does not fit into {steps} steps")


def filled(defaults, args):
    """Returns the arguments with defaults for those that are None; --epochs replaces a default of --steps.

    defaults: flag -> value.
    """
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    steps = dict(steps=None) if "epochs" in given else {}
    return argparse.Namespace(**vars(args) | defaults | steps | given)


NAMED = set()  # what is in the command line: code is run only if it is (models/own.py)
LIMITS = {int: 2**31, float: math.inf}


def positive(kind, below=None):
    below = below or LIMITS[kind]
    return number(kind, lambda x: 0 < x < below, f"above 0 and below {below}")


def from_0(kind, below=None):
    below = below or LIMITS[kind]
    return number(kind, lambda x: 0 <= x < below, f"at least 0 and below {below}")


def number(kind, right, words):
    """Returns an argparse type for numbers of a kind for which right(number) is true; words: says which."""
    def convert(text):
        if not right(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    convert.__name__ = kind.__name__  # in argparse's message on what is no number
    return convert


BETA = number(float, lambda x: 1e-6 <= x <= 1e12, "from 1e-6 to 1e12")


def parsed(p, argv):
    """Returns the arguments of a command line; exits if one is empty, as that of an unset variable."""
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        words = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str)]
        NAMED.update(words)
        if "" in words and name != "prompt":
            p.error(f"--{name.replace('_', '-')} is empty")
        if any("\udc80" <= c <= "\udcff" for word in words for c in word):
            p.error(f"--{name.replace('_', '-')} is not readable in this locale: set LC_ALL=C.UTF-8")
    return args
