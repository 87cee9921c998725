"""Rewards as low-rank changes of the source (LoRA, Hu et al. 2021, arXiv 2106.09685): --lora RANK.

Every linear layer computes W x + B (A x). W [outputs, inputs] is the source's and frozen; only the factors
A [rank, inputs] and B [outputs, rank] are trained, and only they are in the file. So one tree of modules is
both models: with the factors on the reward model, with the factors off the source (`Source`), and a frozen
weight is in memory once. Embeddings, norms, biases, and convolutions are the source's.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models import gpt, weights

FACTORS = (".A", ".B")  # ends of their names


class LowRank(nn.Module):
    """A linear layer x [..., inputs] -> [..., outputs], whose frozen matrix is changed or replaced by B A.

    weight, bias: the frozen parameters. replace: whether B A takes the matrix's place, as a new, random
    output matrix. on: False for the source's layer. Factors are cast to the dtype of x.
    """

    def __init__(self, weight, bias, rank, replace, random):
        super().__init__()
        self.weight, self.bias, self.replace, self.on = weight, bias, replace, True
        outputs, inputs = weight.shape
        self.A = nn.Parameter(torch.randn(rank, inputs, generator=random) * inputs**-0.5)
        scale = gpt.HEAD_STD * rank**-0.5 if replace else 0.0  # 0: training starts at W x
        self.B = nn.Parameter(torch.randn(outputs, rank, generator=random) * scale)

    def forward(self, x):
        """Returns W x, if the factors are off, or else W x + B (A x), or B (A x) alone."""
        if not self.on:
            return F.linear(x, self.weight, self.bias)
        change = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return change if self.replace else F.linear(x, self.weight, self.bias) + change

    def merged(self):
        """Returns a linear layer with the matrix W + B A, or B A."""
        matrix = self.B @ self.A if self.replace else self.weight + self.B @ self.A
        layer = nn.Linear(*matrix.shape[::-1], bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(matrix), self.bias
        return layer


class Source(nn.Module):
    """The source in a model of `LowRank` layers: the same modules with the factors off. For no gradients."""

    def __init__(self, model):
        super().__init__()
        self.tree = [model]  # in a list: it is no submodule, whose factors are trained

    def parameters(self):
        """Returns the frozen parameters."""
        return (p for p in self.tree[0].parameters() if not p.requires_grad)

    def forward(self, *inputs):
        return self.off(self.tree[0], *inputs)

    def head(self, features):
        """Maps features [..., D] to logits; for text."""
        return self.off(self.tree[0].head, features)

    def off(self, function, *inputs):
        """Returns function(*inputs), computed with the factors off."""
        layers = [module for module in self.tree[0].modules() if isinstance(module, LowRank)]
        for layer in layers:
            layer.on = False
        try:
            return function(*inputs)
        finally:
            for layer in layers:
                layer.on = True


def convert(model, rank, new_head, seed=0):
    """Makes the linear layers of a model `LowRank`, in place, and freezes all but their factors.

    new_head: whether a GPT gets a new output matrix; then the source's, or its embedding, is used by `Source`
    alone. Raises ValueError if there is no linear layer, or one is smaller than the rank.
    """
    random = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if new_head:
        model.lm_head = linear["lm_head"] = model.lm_head or model.embed_tokens
    if not linear or min(min(module.weight.shape) for module in linear.values()) < rank:
        raise ValueError(f"--lora {rank}: larger than a layer of this model, or there is no linear layer")
    for name, module in sorted(linear.items()):
        bias = getattr(module, "bias", None)  # an embedding has none
        layer = LowRank(module.weight, bias, rank, new_head and name == "lm_head", random)
        model.set_submodule(name, layer)


def start(args, model, info):
    """Makes the source a reward model, in place, and returns the `Source` in it.

    info: entries of the checkpoint, to which those of its file are added.
    """
    info["lora"] = dict(rank=args.lora, new_head=args.reward_init == "head")
    convert(model, **info["lora"], seed=args.seed + 1)
    return Source(model)


def packed(state):
    """Returns the factors in the state of a model, in one tensor: a tensor each would double a small file."""
    factors = [x.flatten() for name, x in sorted(state.items()) if name.endswith(FACTORS)]
    return dict(factors=torch.cat(factors))


def load(info, dtype, source):
    """Returns the model of a finished reward; info: its checkpoint. dtype, source: as in weights.load.

    In bfloat16 the factors stay beside the matrices, since adding them would lose small changes. Otherwise
    they are merged, in float32. Raises ValueError if the source's weights are not those of the training.
    """
    apart = dtype == torch.bfloat16 and info["kind"] == "gpt"
    name = source or info["source"]
    model = weights.load_base(name, info, dtype if apart else torch.float32)
    if weights.fingerprint(model) != info["source_sha256"]:
        raise ValueError(f"it changes other weights than those of {name}, its --source")
    convert(model, **info["lora"])
    factors = [p for name, p in sorted(model.named_parameters()) if name.endswith(FACTORS)]
    sizes, found = [p.numel() for p in factors], info["model"]["factors"]
    if found.shape != (sum(sizes),) or not found.isfinite().all():
        raise ValueError(f"its factors have shape {[*found.shape]}, not [{sum(sizes)}], or are not finite")
    for p, x in zip(factors, found.float().split(sizes)):
        p.data = x.view_as(p)
    for name, layer in [(k, x) for k, x in model.named_modules() if isinstance(x, LowRank)]:
        if apart and layer.replace:
            layer.weight = None  # another model's, if it is not the embedding
        if not apart:
            model.set_submodule(name, layer.merged())
    if info["lora"]["new_head"]:
        model.arch["tied"] = False
    if info["kind"] == "gpt":
        model.arch["end"] = info["arch"]["end"]  # of the training: a chat template may have its own
    model.info = {k: v for k, v in info.items() if k != "model"}
    return model
