"""Trains a reward on images.

python train_vision.py                                  two small CLIPs, a reward, and their table
python train_vision.py --data cifar100                  the paper's recipe: ViT-B-16 (LAION-400M), one GPU
python train_vision.py --data cifar100 --method ft      plain fine-tuning of the source, for EFT
python train_vision.py --data DIR --source net.py:old   a network of your own (models/own.py)
python train_vision.py --data DIR --method pretrain     a base of your own, from captions
torchrun --nproc_per_node=8 train_vision.py --data cifar100

Without --data, --source, and --method it makes the five models of models/examples.py; other flags apply to
all of them, --reward-init to the reward alone. --beta is the unit of the reward, which is beta times the
network's logits (the paper's lambda). It cancels out of the loss unless --alpha is set, the weight of the
entropy of softmax(reward). Each process computes its part of --batch in --accum micro-batches.

The defaults suit public weights and thousands of examples. For 200: --steps 300 --batch 32 --hold-out 0.2
--keep-best, and for a small network of your own a higher --lr, such as 3e-4. OUT.jsonl is the log of a run.
"""
import torch

import prt
from data import hub, images
from models import flags, runs, scores, watch, weights
from models.clip import resize

REMEDY = "raise --accum, train --lora, or use more GPUs (torchrun)"
# Flag -> default, the paper's recipe. Pretraining and small rewards (masks, low-rank) change some of them.
PAPER = dict(data="shapes", method="prt", source="timm/vit_base_patch16_clip_224.laion400m_e32", steps=2000,
             batch=128, accum=1, lr=1e-5, weight_decay=0.0, beta=1.0, alpha=0.0, hold_out=0.0, seed=0)
RECIPES = dict(prt=PAPER, ticket=PAPER | dict(lr=1e-2, keep=0.5, freeze=0.0), lora=PAPER | dict(lr=1e-4),
               pretrain=PAPER | dict(source=None, size="small", steps=1200, lr=5e-4))


def parse(argv=None):
    """Returns the arguments of a command line; without one of --data, --source, and --method, as given."""
    p, run, recipe, _ = flags.training(__doc__, RECIPES, "a quarter of the steps")
    run.add_argument("--data", help="shapes, cifar100, caltech101, flowers, resisc45, cars, aircraft, "
                     "country211, a Hub id, or a folder (default: shapes)")
    run.add_argument("--size", choices=("tiny", "small"),
                     help="size of the CLIP to pretrain (default: small)")
    run.add_argument("--reward-init", help="start the reward as a copy of --source (copy), with random "
                     "weights (random), or as a reward, by its path (default: copy)")
    recipe.add_argument("--augment", action="store_true", help="random crops and flips")
    args = flags.parsed(p, argv)
    if args.reward_init == "head":
        p.error("--reward-init head is for text: a CLIP's head is made of the class names")
    other = args.ticket or args.method == "pretrain" or args.reward_init == "random"
    if other and hub.OWN.fullmatch(args.source or ""):
        p.error("a network of your own goes without --ticket, --method pretrain, and --reward-init random")
    return flags.resolve(p, args, RECIPES, no_pretraining=[])


def main():
    """Trains one model, or the five of the example."""
    args = parse()
    device = runs.setup(args.device)
    if args.method is None:
        from models import examples  # optional files are imported where they are needed
        examples.run(examples.VISION, args, device, parse, train)
    else:
        with weights.run(args) as state:
            train(args, device, state)


def train(args, device, state):
    """Trains a reward, a fine-tuned model, or a base, and prints its accuracy on the test split.

    state: the checkpoint to continue from, or None.
    """
    torch.manual_seed(args.seed)
    if args.method == "pretrain":
        from models import pretrain
        return pretrain.clip(args, device, state)

    # The source, as a zero-shot classifier, and the data.
    clip = weights.load(args.source, "base", text=False, dtype=None)
    data, test = (images.load(args.data, split, clip.arch["image_size"]) for split in ("train", "test"))
    source = weights.as_classifier(clip, data.classes, data.templates, device).requires_grad_(False)
    info = dict(kind="classifier", arch=source.arch, classes=data.classes, templates=data.templates,
                examples=data.examples, data=args.data, method=args.method, beta=args.beta,
                source=args.source, source_sha256=weights.fingerprint(source))
    weights.check_same(args, state, info)
    indices = runs.batches(len(data.labels), args.hold_out, args.batch, args.seed)
    del clip  # and its text tower

    # The reward model, which starts as a copy of the source, or as --reward-init.
    begin = source
    if args.reward_init not in (None, "copy", "random"):
        begin = weights.load(args.reward_init, "prt", text=False, source=args.source)
        if begin.arch != source.arch or begin.info["classes"] != data.classes:
            raise ValueError(f"--reward-init {args.reward_init}: its architecture or classes are others")
    model = weights.build(info, source.arch, begin.state_dict(), dtype=None)  # shares its weights so far
    frozen = runs.frozen_dtype(device)  # bfloat16 on CUDA, to which autocast would cast in any case
    if args.ticket or args.reward_init == "random":
        from models import tickets
        tickets.start(args, model, info, state)
    elif args.lora:
        from models import lora
        source = lora.start(args, model, info)  # the same modules, with what is trained left out
    if not args.lora:
        runs.place(source, device, frozen, compile=args.compile and args.augment)
    runs.place(model, device, frozen if args.lora else torch.float32, compile=args.compile)
    held = runs.hold_out(len(data.labels), args.hold_out)[1]
    test_logits = scores.predict(source, test.images)
    pixels, labels = runs.move_if_it_fits(data.images, device), data.labels.to(device)
    if args.augment:  # the images differ in every step, and the source runs in each of them
        held_logits = scores.predict(source, data.images[held]) if len(held) else None
    else:
        source, source_logits = None, scores.predict(source, pixels)  # [N, L]
        held_logits = source_logits[held]

    def fetch(i, generator):
        x, y = runs.take(pixels, i, device), runs.take(labels, i, device)
        if args.augment:
            return (images.augment(resize(x, model.arch["image_size"]), generator),), y, None
        return (x,), y, runs.take(source_logits, i, device)

    def score(x, base_logits, y):  # of the source with the reward
        r = prt.reward(scores.predict(model, x), base_logits if args.method == "ft" else None, args.beta)
        return scores.classification(prt.tilt(base_logits, r, args.beta), y)

    # Algorithm 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    said = dict(images=f"{len(data.labels) - len(held)} of {len(data.labels)}", classes=len(data.classes))
    rows, hooks = watch.begin(args, info, model, optimizer, state, args.steps, said, len(held) and (
        lambda: score(data.images[held], held_logits, data.labels[held])))
    history = prt.fit(
        model, indices, fetch, base=source, method=args.method, beta=args.beta, alpha=args.alpha,
        optimizer=optimizer, steps=args.steps,
        warmup=args.steps // 4 if args.warmup is None else args.warmup, accum=args.accum, seed=args.seed,
        **hooks)
    watch.end(args, rows, history[-1]["step"], args.steps)

    before = scores.accuracy(test_logits, test.labels)
    after = score(test.images, test_logits, test.labels)["accuracy"]
    print(f"{args.source} alone: {before:.2%} on the test split")
    print(f"{args.out}: {after:.2%} on the test split")
    watch.compare(args, before, after)


if __name__ == "__main__":
    runs.main(main, REMEDY)
