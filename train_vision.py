"""Tunes a reward on images.

python train_vision.py                                  two small CLIPs and a reward, from nothing
python train_vision.py --data cifar100                  the paper's recipe: ViT-B-16 (LAION-400M), one GPU
python train_vision.py --data cifar100 --method ft      fine-tuning: EFT's ingredient, or the upper line
python train_vision.py --data DIR --method pretrain     a base of one's own, from captions
torchrun --nproc_per_node=8 train_vision.py --data cifar100
"""
import argparse
import copy
from pathlib import Path

import torch

import prt
from data import images
from models import weights
from models.clip import CLIP, classifier

LAION400M = "timm/vit_base_patch16_clip_224.laion400m_e32"
PAPER = dict(method="prt", base=LAION400M, steps=2000, batch=128, lr=1e-5, weight_decay=0.0, accum=1)
SCRATCH = dict(method="pretrain", size="small", steps=1200, batch=128, lr=5e-4, weight_decay=0.0, accum=1)
TUNE = dict(PAPER, steps=300, lr=3e-4)  # small networks move faster
# The run without arguments: five checkpoints, each a single run of this script.
DEMO = dict(old=dict(SCRATCH, size="tiny", steps=600, lr=1e-3), new=SCRATCH, reward=dict(TUNE, base="old"),
            tuned=dict(TUNE, base="old", method="ft"), oracle=dict(TUNE, base="new", method="ft"))
TINY = dict(embed_dim=64, image_size=32, patch=8, width=64, layers=2, heads=2, text_width=64, text_layers=2,
            text_heads=2, context=77, vocab=49408, mean=[0.5] * 3, std=[0.25] * 3, quick_gelu=False)
SIZES = dict(tiny=TINY, small=TINY | dict(width=128, layers=3, heads=4))


def parse():
    p = prt.arguments(__doc__)
    p.add_argument("--data", default="shapes", help="name, hub id or folder (data/images.py lists them)")
    p.add_argument("--size", choices=SIZES, help="of the CLIP that --method pretrain makes")
    p.add_argument("--augment", action="store_true", help="random crops and flips")
    p.add_argument("--out", help="checkpoint to write; for the run without --base and --method, a folder")
    return p.parse_args()


def main():
    args = parse()
    device = prt.setup(args.device)
    given = {k: v for k, v in vars(args).items() if v is not None}
    if args.data != "shapes" or args.method or args.base:
        recipe = SCRATCH if args.method == "pretrain" else PAPER
        out = f"out/{Path(args.data).name}-{args.method or 'prt'}.pt"
        return train(argparse.Namespace(**vars(args) | recipe | dict(out=out) | given), device)
    folder = args.out or f"out/shapes-{args.seed}"
    paths = weights.stages(DEMO, args, folder, lambda run: train(run, device))
    print("\npython eval.py --reward {reward} --base {new} --tuned {tuned} --ref {old} --oracle {oracle} "
          "--picture {folder}/picture.png".format(folder=folder, **paths))


def take(tensor, i, device):
    """tensor[i] on the device, without waiting for it where the tensor lies there."""
    return tensor[i.to(tensor.device, non_blocking=True)].to(device, non_blocking=True)


def train(args, device):
    """One run: data, base, reward, fit, score."""
    state = weights.unfinished(args)
    torch.manual_seed(args.seed)
    pretraining = args.method == "pretrain"
    split = "captioned" if pretraining and args.data == "shapes" else "train"
    with weights.alone():
        clip = CLIP(SIZES[args.size]) if pretraining else weights.load(args.base, "base", text=False)
        data, test = (images.load(args.data, name, clip.arch["image_size"]) for name in (split, "test"))
    if state and state["classes"] != data.classes:
        raise ValueError(f"--resume: {args.out} was begun with other classes than --data {args.data} has")
    clip = clip.to(device)
    pixels, labels = prt.place(data.images, device), data.labels.to(device)
    prompts = images.prompts(data.classes, data.templates)
    header = dict(arch=clip.arch, classes=data.classes, templates=data.templates, data=args.data,
                  args=weights.settings(args))

    def view(i, generator):
        x = take(pixels, i, device)
        return images.augment(x, generator) if args.augment else x

    if pretraining:
        header |= dict(kind="clip")
        policy, base, texts = clip, None, images.captions(data).to(device)

        def fetch(i, generator):
            one = torch.randint(texts.shape[1], (len(i),), generator=generator)
            caption = take(texts.flatten(0, 1), i * texts.shape[1] + one, device)
            return (view(i, generator), caption), torch.arange(len(i), device=device).repeat(2), None
    else:
        header |= dict(kind="classifier", method=args.method, beta=args.beta, source=args.base)
        policy = classifier(clip, prompts)
        del clip  # and with it the text tower
        test_base = prt.predict(policy, test.images)
        if args.augment:  # another view in every step, so the frozen base answers in every step
            base, cached = copy.deepcopy(policy).requires_grad_(False), None
        else:
            base, cached = None, prt.predict(policy, pixels)  # [N, L]

        def fetch(i, generator):
            known = None if cached is None else take(cached, i, device)
            return (view(i, generator),), take(labels, i, device), known

    warmup = args.steps // 4 if args.warmup is None else args.warmup
    prt.fit(policy, lambda step: prt.shuffled(step, len(labels), args.batch, args.seed), fetch, base=base,
            steps=args.steps, warmup=warmup, state=state, name=Path(args.out).stem,
            save=lambda done: weights.save(args.out, header | done), **prt.options(args))

    scores = prt.predict(classifier(policy, prompts) if pretraining else policy, test.images)
    if not pretraining:
        r = prt.reward(scores, test_base if args.method == "ft" else None, args.beta)
        scores = prt.tilt(test_base, r, args.beta)
        print(f"{args.base} alone: {prt.accuracy(test_base, test.labels):.2%} on the test split")
    print(f"{args.out}: {prt.accuracy(scores, test.labels):.2%} on the test split")


if __name__ == "__main__":
    prt.run(main)
