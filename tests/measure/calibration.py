"""Why EFT breaks on overconfident networks, and what a temperature changes: a look at held-out images.

python tests/measure/calibration.py --shift negatives --seeds 0 1

For PRT's reward and EFT's log-ratio, each as real_weights.py makes it, prints means over the seeds:
  alone     the top-1 of the correction by itself
  in tails  the share of images whose most likely label by the correction has less than 1% from both the old
            and the tuned network: training hardly constrains what the correction says about such labels
  0.25 ...  the top-1 of the new network with the correction, by beta
  50 images the gain in points over beta = 1 on the other held-out images, if beta is chosen on a random 50

and all of it once more with calibrated bases: before tuning, their logits are divided by the temperature with
the lowest NLL on the training images (Guo et al. 2017). No image of the test split is read.
"""
import argparse

import real_weights
import torch
import torch.nn.functional as F
from real_weights import BETAS, REWARDS

import prt
from models import flags, runs, scores

TEMPERATURES = [2 ** (k / 4) for k in range(-8, 13)]  # 0.25 to 8
SHOWN = (0.25, *BETAS, 8.0, 16.0)


class Calibrated(torch.nn.Module):
    """A network whose logits are divided by the temperature with the lowest NLL of these labels."""

    def __init__(self, network, pixels, labels):
        super().__init__()
        self.network, self.size, self.mean = network, network.size, network.mean
        logits = scores.predict(network, pixels).cpu()
        self.temperature = min(TEMPERATURES, key=lambda t: F.cross_entropy(logits / t, labels))

    def forward(self, x):
        return self.network(x) / self.temperature


def with_few_images(right, nll, n, draws=500):
    """Returns the mean gain of beta over 1 on the other images, if it is chosen on n of them.

    right, nll: beta -> values of each image, [N].
    """
    generator, gains = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        chosen, others = torch.randperm(len(right[1.0]), generator=generator).tensor_split([n])
        best = max(BETAS, key=lambda b: (right[b][chosen].mean(), -nll[b][chosen].mean()))
        gains.append(right[best][others].mean() - right[1.0][others].mean())
    return torch.stack(gains).mean()


def figures(method, logits, labels):
    """Returns the columns of the table, from the networks' logits [N, L] of held-out images."""
    correction = REWARDS[method](logits)
    favorite = correction.argmax(-1, keepdim=True)
    tails = [logits[name].softmax(-1).gather(-1, favorite) < 0.01 for name in ("old", "tuned")]
    log_probs = {beta: prt.tilt(logits["new"], correction, beta) for beta in SHOWN}
    right = {beta: (x.argmax(-1) == labels).float() for beta, x in log_probs.items()}
    nll = {beta: F.nll_loss(x, labels, reduction="none") for beta, x in log_probs.items()}
    alone = torch.tensor(scores.accuracy(correction, labels))
    return torch.stack([alone, (tails[0] & tails[1]).float().mean(), *(x.mean() for x in right.values()),
                        with_few_images(right, nll, 50)])


def run(args, seed, calibrated):
    """Returns method -> figures of a seed; prints the temperatures."""
    networks = dict(old=real_weights.Network(args.old, args.size[0]).to(args.device),
                    new=real_weights.Network(args.new, args.size[1]).to(args.device))
    used_i, held_out_i = runs.hold_out(len(real_weights.photographs(args, "train", args.size[0])[1]), 0.2)
    if calibrated:
        for name, network in networks.items():
            data = (x[used_i] for x in real_weights.photographs(args, "train", network.size))
            networks[name] = Calibrated(network, *data)
            print(f"temperature of {name}: {networks[name].temperature:.2f}")
    for name, method in (("reward", "prt"), ("tuned", "ft")):
        data = (x[used_i] for x in real_weights.photographs(args, "train", args.size[0]))
        networks[name], _ = real_weights.tune(args, seed, networks["old"], method, *data)
    logits = {}
    for name, network in networks.items():
        pixels, labels = (x[held_out_i] for x in real_weights.photographs(args, "train", network.size))
        logits[name] = scores.predict(network, pixels).cpu()
    top1 = {name: f"{scores.accuracy(logits[name], labels):.1%}" for name in ("old", "tuned", "new")}
    print(f"held-out top-1 of each network alone: {top1}")
    return {method: figures(method, logits, labels) for method in REWARDS}


def main():
    p = flags.parser(__doc__)
    p.add_argument("--data", default=real_weights.DEFAULTS["data"])
    p.add_argument("--shift", choices=("negatives", "thumbnails", "none"), default="negatives")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--device", default="")
    args = argparse.Namespace(**real_weights.DEFAULTS | dict(size=real_weights.SIZES) | vars(p.parse_args()))
    args.device = runs.setup(args.device)
    lines = [" " * 22 + f"{'alone':>9}{'in tails':>9}" + "".join(f"{b:>8g}" for b in SHOWN) + "  50 images"]
    for calibrated in (False, True):
        tables = [run(args, seed, calibrated) for seed in args.seeds]
        for method in REWARDS:
            alone, tails, *top1, gain = torch.stack([table[method] for table in tables]).mean(0).tolist()
            title = f"{method}, calibrated" if calibrated else method
            lines.append(f"{title:22}{alone:9.1%}{tails:9.1%}" + "".join(f"{x:8.1%}" for x in top1)
                         + f"{100 * gain:+11.1f}")
    print(f"\n{vars(args)}, torch {torch.__version__}\n" + "\n".join(lines))


if __name__ == "__main__":
    runs.main(main)
