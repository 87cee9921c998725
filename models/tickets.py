"""Rewards as strong lottery tickets: masks over weights that are never trained.

Every weight w has a score. The network computes with m * w, where m is 1 for the fraction `keep` of weights
with the highest scores, and 0 for the others (Edge-Popup, Ramanujan et al. 2020). A file has one bit for each
weight. The weights are those of the source base (kind "base"), or come from a seed (kind "random").

Otsuka et al. (TMLR 2025, arXiv 2402.14029) freeze the mask of a random fraction `freeze` of weights before
training: of these, the fraction `keep` is locked (m = 1), the rest pruned (m = 0). Only the other weights are
searched: they have scores, and bits in the file. Embeddings, norms, and biases have no mask, and are fixed.
"""
import hashlib

import torch
from torch import nn
from torch.nn.utils import parametrize

from models.weights import network_module


class TopK(torch.autograd.Function):
    """The mask [S] of the k highest of scores [S], with a straight-through gradient.

    forward: m_i = 1 if s_i is one of the k highest scores (of equal ones, the first), else 0.
    backward: dL/ds_i = dL/dm_i, as if m were s. As the weight is m_i w_i, this is w_i dL/d(m_i w_i).
    """

    @staticmethod
    def forward(ctx, scores, k):
        """Returns the mask; 1 <= k <= S."""
        threshold = scores.topk(k, sorted=False).values.min()  # on CUDA, kthvalue takes 0.7 s per 1e8 scores
        above, equal = scores > threshold, scores == threshold
        first = equal.cumsum(0, dtype=torch.int32) <= k - above.count_nonzero()
        return (above | (equal & first)).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class MaskedWeight(nn.Module):
    """Computes m * w from the scores [S] of the searched weights; a parametrization of torch.nn.utils."""

    def __init__(self, weight, settings, generator):
        super().__init__()
        n, mask, searched = weight.numel(), None, None
        locked, self.size, self.k = counts(n, settings)
        if settings["freeze"]:  # else nothing needs an index
            order = torch.randperm(n, generator=generator).to(weight.device)
            mask = torch.zeros_like(order, dtype=weight.dtype).index_fill(0, order[:locked], 1.0)
            searched = order[n - self.size:].sort().values
        for name, x in dict(weight=weight, locked=mask, searched=searched).items():
            self.register_buffer(name, x, persistent=False)

    def forward(self, scores):
        """Returns m * w, in the shape of w."""
        return self.masked(TopK.apply(scores, self.k))

    def masked(self, mask):
        """Returns m * w from the mask [S] of the searched weights."""
        if self.searched is not None:
            mask = self.locked.index_copy(0, self.searched, mask)
        return mask.view_as(self.weight) * self.weight

    def right_inverse(self, weight):
        """Returns the first scores [S]: magnitudes times noise, since those of random weights are equal."""
        magnitudes = weight.abs().flatten()[slice(None) if self.searched is None else self.searched]
        return magnitudes * torch.rand_like(magnitudes)


def counts(n, settings):
    """Returns how many of n weights are locked, how many are searched, and how many of these are kept."""
    keep, freeze = settings["keep"], settings["freeze"]
    locked, pruned = round(freeze * keep * n), round(freeze * (1 - keep) * n)
    searched = max(1, n - locked - pruned)
    return locked, searched, min(max(1, round(keep * n) - locked), searched)


def is_masked(name, parameter):
    return parameter.ndim > 1 and "embed" not in name


@torch.no_grad()
def randomize(model, keep, generator):
    """Replaces matrices by signed Kaiming constants, +-(2 / (keep * inputs))^0.5, a head by random signs."""
    def signs(shape):
        return torch.randint(2, shape, generator=generator) * 2.0 - 1
    tied = model.arch.get("tied")  # the embedding is the output matrix, too
    for name, p in model.named_parameters():
        if is_masked(name, p):  # [outputs, inputs, ...]; CLIP's proj is transposed, but its scale cancels out
            p.copy_(signs(p.shape) * (2 / (keep * p[0].numel())) ** 0.5)
        elif "embed" in name:
            p.copy_(signs(p.shape) * (p.shape[1] ** -0.5 if tied else 1.0))
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    if hasattr(model, "visual"):  # a classifier of images
        model.head = signs(model.head.shape) * model.head.shape[1] ** -0.5 / 0.07  # CLIP's first scale


def masked_weights(model, settings):
    """Returns sorted name -> MaskedWeight, and a checksum; a "random" model first gets its weights."""
    generator = torch.Generator().manual_seed(settings["seed"])
    if settings["kind"] == "random":
        randomize(model, settings["keep"], generator)
    masked = {name: MaskedWeight(p.detach(), settings, generator)
              for name, p in sorted(model.named_parameters()) if is_masked(name, p)}
    fixed = [x for name, x in model.state_dict().items() if name != "head"]  # whose rounding may differ
    checksum = hashlib.sha256()
    for x in (*fixed, *(part.locked for part in masked.values() if part.searched is not None)):
        checksum.update(x.cpu().contiguous().numpy())
    return masked, checksum.hexdigest()


def convert(model, settings):
    """Turns a GPT or Classifier into a ticket, which trains scores only; returns settings with a checksum."""
    masked, checksum = masked_weights(model, settings)
    model.requires_grad_(False)
    for name, part in masked.items():
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        parametrize.register_parametrization(module, parameter, part, unsafe=True)  # changes the shape
        module.parametrizations[parameter].original.requires_grad_()
    return settings | dict(checksum=checksum)


def check_flags(p, args):
    """Exits with one line if --ticket, --keep, --freeze, --reward-init, or --method contradict each other."""
    if args.ticket and args.reward_init:
        p.error("--reward-init: a ticket's weights are those that --ticket names; leave it out")
    if args.ticket and args.method == "pretrain":
        p.error("--ticket is for rewards, not for --method pretrain")
    if args.ticket is None and (args.keep or args.freeze):
        p.error("--keep and --freeze are for tickets: add --ticket random or --ticket base")


def start(args, model, info, state):
    """Does to a copy of the source, in place, what --reward-init random or --ticket asks for.

    info: entries of the checkpoint, to which a ticket's are added. state: the checkpoint to continue from, or
    None. Raises ValueError if that was a mask over other weights.
    """
    model.float()  # it may share its weights with the source: from here on they are replaced, not written to
    if "random" in (args.reward_init, args.ticket):
        torch.manual_seed(args.seed + 1)  # the source may have started from the weights of args.seed
        head = model.head if info["kind"] == "classifier" else None
        model.load_state_dict(network_module(info).network(info, model.arch, head).state_dict(), assign=True)
    if not args.ticket:
        return
    settings = dict(kind=args.ticket, keep=args.keep, freeze=args.freeze, seed=args.seed)
    info["ticket"] = convert(model, settings)
    if state and state["ticket"]["checksum"] != info["ticket"]["checksum"]:
        raise ValueError(f"--resume: {args.out} was started with other weights below the mask")
