"""What tuning a GPT needs of a GPU's memory, and how many tokens of a micro-batch therefore fit."""
import torch
import torch.distributed as dist

from models import runs

BYTES_PER_LOGIT = 22  # of a chunk, for each target and token of the vocabulary (chunk_size)
BACKWARD = 0.4  # what a layer's own backward pass takes, over what the layer keeps
RESERVE = 1 / 10  # of the memory, for CUDA itself and for gaps between tensors


def bytes_per_token(arch, recompute, autocast=True):
    """Returns how many bytes a token takes at the peak of the backward pass.

    In bfloat16 autocast, a layer keeps the inputs of its two norms in float32, 4 bytes each, and everything
    else in bfloat16, 2 bytes each: the norms' outputs, which autocast casts anew for each of the matrices
    that read them (5, or 4 without a gate), rotated queries and keys, values, attention's output, and 4
    values in the gated MLP (2 without a gate). Without autocast (--lora on CUDA) all weights are in bfloat16:
    the norms' inputs have 2 bytes each, and their outputs are kept once. With recompute, a layer keeps its
    input alone until it is computed again.

    For Qwen2.5-0.5B a layer keeps 18 x 896 + 4 x (896 + 128) + 8 x 4,864 = 59,136 bytes; 24.4 of them are
    1.44 MB, and with recompute 24 x 4 x 896 + 1.4 x 59,136 bytes are 0.17 MB.
    """
    width, query, key = arch["width"], *(arch[k] * arch["head_width"] for k in ("heads", "kv_heads"))
    norms, mlp = (18, 8) if arch["gated_mlp"] else (16, 4)
    layer = (norms if autocast else 8) * width + 4 * (query + key) + mlp * arch["mlp"]
    if arch.get("qk_norm"):  # its inputs
        layer += (4 if autocast else 2) * (query + key)
    if recompute:
        return (4 if autocast else 2) * width * arch["layers"] + (1 + BACKWARD) * layer
    return (arch["layers"] + BACKWARD) * layer


def choose(args, longest, model, source, device):
    """Returns --accum and --chunk: those of args, or else the smallest and the largest that fit into memory.

    longest: tokens of the longest example. source: as in `needs`. Prints what training will need. Raises
    ValueError if not even one such example fits. With several processes, the smallest GPU counts, so that all
    of them choose the same.
    """
    memory = torch.tensor(torch.cuda.mem_get_info(device)[1])  # all of it, so that neighbors do not matter
    if runs.world_size() > 1:
        dist.all_reduce(memory, dist.ReduceOp.MIN)
    memory, each = int(memory), args.batch // runs.world_size()
    chunk = args.chunk or chunk_size(model.arch["vocab"], memory)
    for accum in [args.accum] if args.accum else [n for n in range(1, each + 1) if each % n == 0]:
        parts = needs(model, source, each // accum * longest, accum, chunk, args.recompute, not args.lora)
        if args.accum or sum(parts.values()) <= (1 - RESERVE) * memory:
            print(f"memory of a GPU: {memory / 1e9:.1f} GB; needed at most: "
                  + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items()))
            return accum, chunk
    raise ValueError(f"an example of {longest} tokens does not fit into the GPU's memory beside the models: "
                     "add --recompute or --lora, lower --length, --chunk, or --batch, or use more GPUs "
                     "(torchrun)")


def chunk_size(vocab, memory):
    """Returns for how many targets prt.fit computes logits at a time: as many as an eighth of memory holds.

    A target takes about 22 bytes per token of the vocabulary: 2 each for the logits of both models in
    bfloat16, and 4 each for up to 5 values in float32, such as r, the tilted logits, their log-softmax, and
    its gradient. With 80 GB and Qwen2.5's 151,936 tokens, these are 2,991 targets.
    """
    return memory // 8 // (BYTES_PER_LOGIT * vocab)


def needs(model, source, tokens, accum, chunk, recompute, autocast=True):
    """Returns what takes how many bytes of each process at the peak of training: name -> bytes.

    model: the GPT to train. source: the frozen one, or None if there is none, or it is in the model (--lora).
    tokens: of a micro-batch. Other arguments as in prt.fit and `bytes_per_token`.

    A trained weight takes 4 bytes each for itself, its gradient, and Adam's two averages, in float32, and in
    autocast 2 for its copy; a frozen one 2. Gradients are whole while micro-batches add them up; with only
    one, they come while what the tokens keep is freed: those of what is in no block (embedding and output
    matrix) come first, in bfloat16 and float32. With several processes weights, averages, and gradients are
    spread over them, but for autocast's copies, for what is in no block, which stays gathered, and for the
    sums of gradients with accum above 1. A block that is gathered for a moment is not counted.
    """
    n, networks = runs.world_size(), [network for network in (model, source) if network]
    frozen, trained = count(networks)
    frozen_outside, trained_outside = (a - b for a, b in zip(
        (frozen, trained), count([network.layers for network in networks])))
    weights = (4 * trained + 2 * frozen) / n + (2 * trained if autocast else 0)
    tokens_keep, targets = tokens * bytes_per_token(model.arch, recompute, autocast), min(chunk, tokens)
    logits = BYTES_PER_LOGIT * targets * model.arch["vocab"]
    if n > 1:
        weights += 4 * trained_outside + 2 * frozen_outside
        gradients = 4 * trained / n + 4 * trained_outside + (4 * trained if accum > 1 else 0)
    elif accum > 1:
        gradients = 4 * trained
    else:
        gradients = max(6 * trained_outside, 4 * trained - tokens_keep - logits)
    return dict(weights=weights, optimizer=8 * trained / n, gradients=gradients, tokens=tokens_keep,
                logits=logits)


def count(modules):
    """Returns the numbers of frozen and of trained weights in a list of modules."""
    parameters = [p for module in modules for p in module.parameters()]
    return [sum(p.numel() for p in parameters if p.requires_grad == kind) for kind in (False, True)]
