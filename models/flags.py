"""Command-line flags of the scripts. Imports nothing slow, so that --help answers at once."""
import argparse
import math

TICKET = dict(lr=1e-2, weight_decay=0.0, keep=0.5, freeze=0.0)  # the recipe's changes with --ticket


def parser(doc, epilog=None):
    return argparse.ArgumentParser(description=doc, epilog=epilog,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def training(doc, tuning, pretraining, stages, warmup):
    """Returns the parser of a training script, and its groups "run", "recipe", and "machine" for more flags.

    tuning: the recipe (flag -> default) of the methods prt and ft. pretraining: that of pretrain. stages:
    name -> recipe of each model that the script makes without arguments. warmup: its default, in words.
    """
    def default(flag):
        tune, pretrain = (recipe.get(flag, "none") for recipe in (tuning, pretraining))
        return f"(default: {tune})" if tune == pretrain else f"(default: {tune}; pretrain: {pretrain})"

    lines = [f"  {name:7}" + "".join(f" --{flag.replace('_', '-')} {value}" for flag, value in recipe.items())
             for name, recipe in stages.items()]
    p = parser(doc, "without any of --data, --base, and --method, trains these models:\n" + "\n".join(lines))
    run, recipe, ticket, machine = (p.add_argument_group(name)
                                    for name in ("run", "recipe", "a reward in a small file", "machine"))
    run.add_argument("--base", help=f"checkpoint, folder, or Hub id of the frozen base {default('base')}")
    run.add_argument("--method", choices=("prt", "ft", "pretrain"),
                     help="train a reward, a fine-tuned model, or a base from scratch (default: prt)")
    run.add_argument("--out", help="checkpoint to write (default: out/DATA-METHOD.pt); a folder if none of "
                     "--data, --base, and --method is given (default: out/DATA-SEED)")
    run.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
    run.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    recipe.add_argument("--steps", type=positive(int), help=f"training steps {default('steps')}")
    recipe.add_argument("--batch", type=positive(int), help=f"examples per step {default('batch')}")
    recipe.add_argument("--accum", type=positive(int), help=f"gradient accumulation {default('accum')}")
    recipe.add_argument("--lr", type=positive(float), help=f"peak learning rate {default('lr')}")
    recipe.add_argument("--warmup", type=int, help=f"steps of linear warmup (default: {warmup})")
    recipe.add_argument("--weight-decay", type=float, help=f"of AdamW; paper: 0 {default('weight_decay')}")
    recipe.add_argument("--beta", type=positive(float), default=1.0, help="scale of the reward (default: 1)")
    recipe.add_argument("--alpha", type=float, default=0.0, help="entropy bonus, eq. 12 (default: 0)")
    recipe.add_argument("--hold-out", type=positive(float, below=1), default=0.0, help="share of the training"
                        " split to leave to eval.py --beta auto (default: 0)")
    lr, weight_decay, keep, freeze = TICKET.values()
    ticket.add_argument("--ticket", choices=("random", "base"), help="train a mask over weights that are "
                        "random, or those of --base (default: none). Changes the defaults of --lr and "
                        f"--weight-decay to {lr} and {weight_decay:g}")
    ticket.add_argument("--keep", type=positive(float, below=1), help="share of ones in the mask "
                        f"(default: {keep})")
    ticket.add_argument("--freeze", type=positive(float, below=1), help="share of the mask that is random, "
                        f"which saves its bits (default: {freeze:g})")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    machine.add_argument("--compile", action="store_true", help="use torch.compile for the networks")
    return p, run, recipe, machine


def resolve(args, recipe, **fixed):
    """Returns a new namespace: `fixed` overrides the flags that are given, which override the recipe."""
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    if "epochs" in given:  # --epochs replaces the recipe's number of steps
        recipe = recipe | dict(steps=None)
    return argparse.Namespace(**vars(args) | recipe | given | fixed)


def positive(kind, below=math.inf):
    """Returns an argparse type for numbers above 0 and below another one; kind: int or float."""
    def number(text):
        value = kind(text)
        if not 0 < value < below:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and below {below}")
        return value
    return number
