"""Command-line flags of the training scripts. Defaults are in the scripts' RECIPES, and nowhere else."""
import argparse
import math
from pathlib import Path


def parser(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def training(doc, recipes, warmup):
    """Returns the parser of a training script, and its groups "run", "recipe", and "machine" for more flags.

    recipes: name -> (flag -> default), for a reward and fine-tuning ("prt"), "pretrain", and "ticket".
    warmup: the default of --warmup, in words.
    """
    def default(flag):
        reward, *others = (recipes[name].get(flag, "none") for name in ("prt", "pretrain", "ticket"))
        others = [f"; {name}: {value or 0}" for name, value in zip(("pretrain", "ticket"), others)
                  if value not in (reward, None)]
        return f"(default: {reward}{''.join(others)})"

    p = parser(doc)
    run, recipe, ticket, machine = (p.add_argument_group(name)
                                    for name in ("run", "recipe", "a reward in a small file", "machine"))
    run.add_argument("--source", help="checkpoint, folder, or Hub id of the frozen model that the reward is "
                     f"trained on {default('source')}")
    run.add_argument("--method", choices=("prt", "ft", "pretrain"),
                     help="train a reward, a fine-tuned model, or a base from scratch (default: prt)")
    run.add_argument("--out", help="checkpoint to write (default: out/DATA-METHOD.pt); a folder if none of "
                     "--data, --source, and --method is given (default: out/DATA-SEED)")
    run.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
    run.add_argument("--seed", type=int, help=f"random seed {default('seed')}")
    recipe.add_argument("--steps", type=positive(int), help=f"training steps {default('steps')}")
    recipe.add_argument("--batch", type=positive(int), help=f"examples per step {default('batch')}")
    recipe.add_argument("--accum", type=positive(int), help=f"gradient accumulation {default('accum')}")
    recipe.add_argument("--lr", type=positive(float), help=f"peak learning rate {default('lr')}")
    recipe.add_argument("--warmup", type=int, help=f"steps of linear warmup (default: {warmup})")
    recipe.add_argument("--weight-decay", type=float, help=f"of AdamW; paper: 0 {default('weight_decay')}")
    recipe.add_argument("--beta", type=positive(float), help=f"scale of the reward {default('beta')}")
    recipe.add_argument("--alpha", type=float, help=f"entropy bonus, eq. 12 {default('alpha')}")
    recipe.add_argument("--hold-out", type=positive(float, below=1), help="share of the training split to "
                        f"leave to eval.py --beta auto {default('hold_out')}")
    ticket.add_argument("--ticket", choices=("random", "base"), help="train a mask over weights that are "
                        "random, or those of --source (default: none)")
    ticket.add_argument("--keep", type=positive(float, below=1), help="share of ones in the mask "
                        f"{default('keep')}")
    ticket.add_argument("--freeze", type=positive(float, below=1), help="share of the mask that is random, "
                        f"which saves its bits {default('freeze')}")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    machine.add_argument("--compile", action="store_true", help="use torch.compile for the networks")
    return p, run, recipe, machine


def resolve(p, args, recipes):
    """Returns the arguments with a recipe's defaults for flags that are not given; exits if flags contradict.

    Without --data, --source, and --method nothing but the built-in example is meant: they stay as they are.
    """
    if args.ticket or args.keep or args.freeze or args.reward_init:
        from models import tickets
        tickets.check_flags(p, args)
    if args.size and args.method != "pretrain":
        p.error("--size is for --method pretrain")
    name = "ticket" if args.ticket else "pretrain" if args.method == "pretrain" else "prt"
    if not (args.source or args.method) and args.data in (None, recipes["prt"]["data"]):
        if args.ticket:
            p.error("--ticket needs a --source, such as old.pt in the folder of a run without flags")
        return args
    args = filled(recipes[name], args)
    args.out = args.out or f"out/{Path(args.data).name}-{args.method}.pt"
    return args


def filled(defaults, args):
    """Returns the arguments with defaults for those that are None; --epochs replaces a default of --steps.

    defaults: flag -> value.
    """
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    steps = dict(steps=None) if "epochs" in given else {}
    return argparse.Namespace(**vars(args) | defaults | steps | given)


def positive(kind, below=math.inf):
    """Returns an argparse type for numbers above 0 and below another one; kind: int or float."""
    def number(text):
        value = kind(text)
        if not 0 < value < below:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and below {below}")
        return value
    return number
