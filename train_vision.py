"""Tunes a reward on images.

python train_vision.py                                   two small CLIPs and a reward, from nothing, on a laptop
python train_vision.py --data cifar100                   the paper's recipe on ViT-B-16 (LAION-400M), one GPU
torchrun --nproc_per_node=8 train_vision.py --data cifar100 --accum 2
python train_vision.py --data cifar100 --method ft       plain fine-tuning: the ingredient of EFT, or the upper line
python train_vision.py --data DIR --method pretrain --size tiny --out old.pt     a base of one's own, from captions
"""
import argparse
import copy
from pathlib import Path

import torch

import prt
from data import images
from models import weights
from models.clip import CLIP, classifier

PAPER = dict(steps=2000, batch=128, lr=1e-5, warmup=500, size="small")
SCRATCH = PAPER | dict(lr=5e-4, warmup=100)
LAION400M = "timm/vit_base_patch16_clip_224.laion400m_e32"
TEXT = dict(text_width=64, text_layers=2, text_heads=2, context=77, vocab=49408, embed_dim=64)
PIXELS = dict(image_size=32, patch=8, mean=[0.5] * 3, std=[0.25] * 3, quick_gelu=False)
SIZES = dict(tiny=TEXT | PIXELS | dict(width=64, layers=2, heads=2), small=TEXT | PIXELS | dict(width=128, layers=3, heads=4))
# The run without arguments: five checkpoints, each a single run of this script.
DEMO = {"old": dict(SCRATCH, method="pretrain", size="tiny", steps=600, lr=1e-3),
        "new": dict(SCRATCH, method="pretrain", size="small", steps=1200),
        "reward": dict(PAPER, method="prt", base="old", steps=300, lr=3e-4, warmup=75),
        "tuned": dict(PAPER, method="ft", base="old", steps=300, lr=3e-4, warmup=75),
        "oracle": dict(PAPER, method="ft", base="new", steps=300, lr=3e-4, warmup=75)}


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="shapes", help="name, hub id or folder (data/images.py lists them)")
    p.add_argument("--base", help="checkpoint, folder or hub id of the frozen CLIP")
    p.add_argument("--method", choices=("prt", "ft", "pretrain"), help="prt (default), plain fine-tuning, or a new CLIP")
    p.add_argument("--size", choices=SIZES, help="of the CLIP that --method pretrain makes")
    p.add_argument("--steps", type=int)
    p.add_argument("--batch", type=int, help="images a step, over all micro-batches and processes")
    p.add_argument("--lr", type=float)
    p.add_argument("--warmup", type=int, help="steps of linear warm-up before the cosine decay")
    p.add_argument("--beta", type=float, default=1.0, help="the strength of the KL term (lambda in the paper)")
    p.add_argument("--alpha", type=float, default=0.0, help="weight of the reward's entropy (eq. 12)")
    p.add_argument("--accum", type=int, default=1, help="micro-batches a step and process")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device")
    p.add_argument("--compile", action="store_true", help="torch.compile the tuned network")
    p.add_argument("--augment", action="store_true", help="random crops and flips; the base then runs in every step")
    p.add_argument("--resume", action="store_true", help="go on from an unfinished --out")
    p.add_argument("--out", help="checkpoint to write; without --base and --method, a folder for all five")
    return p.parse_args()


def main():
    args = parse()
    device = prt.setup(args.device)
    given = {k: v for k, v in vars(args).items() if v is not None}
    if args.data != "shapes" or args.method or args.base:
        method = args.method or "prt"
        recipe = (SCRATCH if method == "pretrain" else PAPER) | dict(method=method, base=LAION400M)
        return train(argparse.Namespace(**dict(recipe, out=f"out/{Path(args.data).name}-{method}.pt") | given), device)
    folder = Path(args.out or f"out/shapes-{args.seed}")
    paths = {name: f"{folder / name}.pt" for name in DEMO}
    for name, recipe in DEMO.items():
        if Path(paths[name]).exists() and "optimizer" not in weights.read(paths[name]):
            print(f"{paths[name]} is kept")
            continue
        run = dict(recipe, base=paths.get(recipe.get("base"))) | given | dict(out=paths[name])
        train(argparse.Namespace(**run | dict(resume=Path(paths[name]).exists())), device)
    print("\npython eval.py --reward {reward} --base {new} --tuned {tuned} --ref {old} --oracle {oracle} "
          "--picture {folder}/picture.png".format(folder=folder, **paths))


def train(args, device):
    """One run: data, base, reward, fit, score."""
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "compile", "out")}
    state = weights.unfinished(args.out, args.resume, settings)
    torch.manual_seed(args.seed)
    pretraining = args.method == "pretrain"
    clip = CLIP(SIZES[args.size]) if pretraining else weights.load(args.base, "clip")
    clip, size = clip.to(device), clip.arch["image_size"]
    data = images.load(args.data, "captioned" if pretraining and args.data == "shapes" else "train", size)
    test = images.load(args.data, "test", size)
    pixels, labels = prt.place(data.images, device), data.labels.to(device)
    prompts = images.prompts(data.classes, data.templates)
    header = dict(arch=clip.arch, data=args.data, classes=data.classes, templates=data.templates, args=settings)

    if pretraining:
        header |= dict(kind="clip")
        policy, base, texts = clip, None, images.captions(data).to(device)

        def load(i, generator):
            choice = torch.randint(texts.shape[1], (len(i),), generator=generator).to(device, non_blocking=True)
            i = i.to(device, non_blocking=True)
            inputs = pixels[i.to(pixels.device)].to(device), texts[i, choice]
            return inputs, torch.arange(len(i), device=device).repeat(2), None
    else:
        header |= dict(kind="classifier", method=args.method, beta=args.beta, source=args.base)
        policy = classifier(clip, prompts)
        del clip  # and with it the text tower
        test_base = prt.predict(policy, test.images)
        if args.augment:  # another view in every step, so the frozen base answers in every step
            base, cached = copy.deepcopy(policy).requires_grad_(False), None
        else:
            base, cached = None, prt.predict(policy, pixels)  # [N, L]

        def load(i, generator):
            i = i.to(device, non_blocking=True)
            x = pixels[i.to(pixels.device)].to(device)
            x = images.augment(x, generator) if args.augment else x
            return (x,), labels[i], None if cached is None else cached[i]

    prt.fit(policy, lambda step: prt.sample(step, len(labels), args.batch, args.seed), load, base=base,
            method=args.method, steps=args.steps, lr=args.lr, warmup=args.warmup, beta=args.beta, alpha=args.alpha,
            accum=args.accum, seed=args.seed, compile=args.compile, state=state, name=Path(args.out).stem,
            save=lambda done: weights.save(args.out, header | done))

    if pretraining:
        scores = prt.predict(classifier(policy, prompts), test.images)
    else:
        r = prt.reward(prt.predict(policy, test.images), test_base if args.method == "ft" else None, args.beta)
        scores = prt.tilt(test_base, r, args.beta)
        print(f"{args.base} alone: {prt.accuracy(test_base, test.labels):.2%} on the test split")
    print(f"{args.out}: {prt.accuracy(scores, test.labels):.2%} on the test split", flush=True)


if __name__ == "__main__":
    prt.run(main)
