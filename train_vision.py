"""Trains a reward on images.

python train_vision.py                                  two small CLIPs and a reward, from scratch
python train_vision.py --data cifar100                  the paper's recipe: ViT-B-16 (LAION-400M), one GPU
python train_vision.py --data cifar100 --method ft      fine-tuning: part of EFT, or the upper bound
python train_vision.py --data DIR --method pretrain     a base of your own, from captions
torchrun --nproc_per_node=8 train_vision.py --data cifar100

--beta is the unit of the reward, which is beta times the network's logits (the paper's lambda). It cancels
out of the loss unless --alpha is set, the weight of the entropy of softmax(reward). Each process computes its
part of --batch in --accum micro-batches.
"""
import copy

from models import flags

LAION400M = "timm/vit_base_patch16_clip_224.laion400m_e32"
PAPER = dict(method="prt", base=LAION400M, steps=2000, batch=128, lr=1e-5, weight_decay=0.0, accum=1)
SCRATCH = dict(method="pretrain", size="small", steps=1200, batch=128, lr=5e-4, weight_decay=0.0, accum=1)
TUNE = dict(PAPER, steps=300, lr=3e-4)  # small networks allow a higher learning rate
# The run without arguments: each stage is a run of this script.
STAGES = dict(old=dict(SCRATCH, size="tiny", steps=600, lr=1e-3), new=SCRATCH, reward=dict(TUNE, base="old"),
              tuned=dict(TUNE, base="old", method="ft"), oracle=dict(TUNE, base="new", method="ft"))
TINY = dict(embed_dim=64, image_size=32, patch=8, width=64, layers=2, heads=2, text_width=64, text_layers=2,
            text_heads=2, context=77, vocab=49408, mean=[0.5] * 3, std=[0.25] * 3, quick_gelu=False)
SIZES = dict(tiny=TINY, small=TINY | dict(width=128, layers=3, heads=4))


def parse():
    """Returns the command line's arguments."""
    p, run, recipe, _ = flags.training(__doc__, PAPER, SCRATCH, STAGES, "a quarter of the steps")
    run.add_argument("--data", default="shapes", help="shapes, cifar100, caltech101, flowers, resisc45, "
                     "cars, aircraft, country211, a Hub id, or a folder (default: shapes)")
    run.add_argument("--size", choices=SIZES, help="size of the CLIP to pretrain (default: small)")
    run.add_argument("--reward-init", choices=["random"], help="random weights (default: those of --base)")
    recipe.add_argument("--augment", action="store_true", help="random crops and flips")
    return p.parse_args()


if __name__ == "__main__":
    parse()  # prints --help and rejects mistyped flags before the imports below, which take seconds

import torch

import prt
from data import files, images
from models import runs, weights
from models.clip import CLIP, classifier, resize


def main():
    """Trains one model, or all of STAGES."""
    runs.launch(parse(), "shapes", PAPER, SCRATCH, STAGES, train)


def train(args, device, state):
    return pretrain(args, device, state) if args.method == "pretrain" else tune(args, device, state)


def tune(args, device, state):
    """Trains a reward or a fine-tuned model, and prints its accuracy on the test split."""
    with files.lock():
        clip = weights.load(args.base, "base", text=False).to(device)
        data, test = load_splits(args, "train", clip.arch["image_size"], state)
    policy = classifier(clip, images.prompts(data.classes, data.templates))
    del clip  # and its text tower
    test_base_logits = runs.predict(policy, test.images)
    pixels, labels = runs.place(data.images, device), data.labels.to(device)
    if args.augment:  # the images differ in every step, so that the base cannot be run once in advance
        base, base_logits = runs.freeze(copy.deepcopy(policy), device), None
    else:
        base, base_logits = None, runs.predict(policy, pixels)  # [N, L]

    def fetch(i, generator):
        x, y = take(pixels, i, device), take(labels, i, device)
        if args.augment:
            return (images.augment(resize(x, policy.arch["image_size"]), generator),), y, None
        return (x,), y, take(base_logits, i, device)

    info = dict(kind="classifier", arch=policy.arch, classes=data.classes, templates=data.templates,
                  data=args.data, method=args.method, beta=args.beta, source=args.base)
    runs.initialize(args, policy, info, state)
    prt.fit(policy, runs.order(args, len(data.labels)), fetch,
            **runs.fit_options(args, args.steps, args.steps // 4, policy, base, device, info, state))

    logits = runs.predict(policy, test.images)
    r = prt.reward(logits, test_base_logits if args.method == "ft" else None, args.beta)
    tilted = prt.tilt(test_base_logits, r, args.beta)
    print(f"{args.base} alone: {runs.accuracy(test_base_logits, test.labels):.2%} on the test split")
    print(f"{args.out}: {runs.accuracy(tilted, test.labels):.2%} on the test split")


def pretrain(args, device, state):
    """Trains a CLIP from scratch; its contrastive loss compares the images and texts of a micro-batch."""
    clip = CLIP(SIZES[args.size]).to(device)
    with files.lock():
        split = "captioned" if args.data == "shapes" else "train"
        data, test = load_splits(args, split, clip.arch["image_size"], state)
    pixels, captions = runs.place(data.images, device), images.captions(data).to(device)  # captions [N, P, T]

    def fetch(i, generator):
        chosen = torch.randint(captions.shape[1], (len(i),), generator=generator)  # one caption per image
        text = take(captions.flatten(0, 1), i * captions.shape[1] + chosen, device)
        x = take(pixels, i, device)
        x = images.augment(resize(x, clip.arch["image_size"]), generator) if args.augment else x
        return (x, text), torch.arange(len(i), device=device).repeat(2), None

    info = dict(kind="clip", arch=clip.arch, classes=data.classes, templates=data.templates, data=args.data)
    prt.fit(clip, runs.order(args, len(data.labels)), fetch,
            **runs.fit_options(args, args.steps, args.steps // 4, clip, None, device, info, state))

    saved = weights.load(args.out, "base", text=False).to(device)
    logits = runs.predict(classifier(saved, images.prompts(data.classes, data.templates)), test.images)
    print(f"{args.out}: {runs.accuracy(logits, test.labels):.2%} on the test split")


def load_splits(args, split, size, state):
    """Returns the training and test splits; raises ValueError if a resumed run began with other classes."""
    data, test = (images.load(args.data, name, size) for name in (split, "test"))
    if state and state["classes"] != data.classes:
        raise ValueError(f"--resume: {args.out} was started with classes other than those of {args.data}")
    return data, test


def take(tensor, i, device):
    """Returns tensor[i] on the device, without synchronizing it."""
    return runs.to_device(tensor[runs.to_device(i, tensor.device)], device)


if __name__ == "__main__":
    runs.main(main)
