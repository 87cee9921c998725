"""What tuning a GPT needs of a GPU's memory, and how many tokens of a micro-batch therefore fit."""
import torch
import torch.distributed as dist

from models import runs

BYTES_PER_LOGIT = 32  # of a chunk, for each target and token of the vocabulary (chunk_size)
RESERVE = 1 / 10  # of the memory, for CUDA itself and for gaps between tensors


def bytes_per_token(arch, recompute):
    """Returns how many bytes a token keeps for the backward pass, in bfloat16 autocast.

    A layer keeps the inputs of its two norms in float32, 4 bytes each, and everything else in bfloat16, 2
    bytes each: the norms' outputs, which autocast casts anew for each of the matrices that read them (5, or 4
    without a gate), rotated queries and keys, values, attention's output, and 4 values in the gated MLP (2
    without a gate). The layer that runs backward takes about as much again. With recompute, a layer keeps its
    input alone, in float32, until it is computed again.

    For Qwen2.5-0.5B a layer keeps 18 x 896 + 4 x (896 + 128) + 8 x 4,864 = 59,136 bytes; 25 of them are
    1.48 MB, and with recompute 24 x 4 x 896 + 2 x 59,136 bytes are 0.20 MB.
    """
    width, query, key = arch["width"], *(arch[k] * arch["head_width"] for k in ("heads", "kv_heads"))
    norms, mlp = (18, 8) if arch["gated_mlp"] else (16, 4)
    layer = norms * width + 4 * (query + key) + mlp * arch["mlp"]
    return 4 * width * arch["layers"] + 2 * layer if recompute else (arch["layers"] + 1) * layer


def choose(args, longest, model, source, device):
    """Returns --accum and --chunk: those of args, or else the smallest and the largest that fit into memory.

    longest: tokens of the longest example. Raises ValueError if not even one such example fits. With several
    processes, the smallest GPU counts, so that all of them choose the same.
    """
    memory = torch.tensor(torch.cuda.mem_get_info(device)[1])  # all of it, so that neighbors do not matter
    if runs.world_size() > 1:
        dist.all_reduce(memory, dist.ReduceOp.MIN)
    chunk, each = args.chunk or chunk_size(model.arch["vocab"], int(memory)), args.batch // runs.world_size()
    if args.accum:
        return args.accum, chunk
    for accum in (n for n in range(1, each + 1) if each % n == 0):
        room = tokens_that_fit(model, source, int(memory), accum, chunk, args.recompute)
        if each // accum * longest <= room:
            return accum, chunk
    raise ValueError(f"an example of {longest} tokens does not fit into the GPU's memory beside the models: "
                     "add --recompute, lower --length, --chunk, or --batch, or use more GPUs (torchrun)")


def chunk_size(vocab, memory):
    """Returns for how many targets prt.fit computes logits at a time: as many as an eighth of memory holds.

    A target takes at most 32 bytes per token of the vocabulary: 2 each for the logits of both models in
    bfloat16, and 4 each for up to 7 values in float32, such as r, the tilted logits, their log-softmax, and
    its gradient. With 80 GB and Qwen2.5's 151,936 tokens, these are 2,056 targets.
    """
    return memory // 8 // (BYTES_PER_LOGIT * vocab)


def tokens_that_fit(model, source, memory, accum, chunk, recompute):
    """Returns how many tokens of a micro-batch fit beside the rest; negative if none do. memory: in bytes.

    With 80 GB, of which 8 are the RESERVE and 10 for the logits of 2,056 targets, Qwen2.5-0.5B's 494 million
    weights take 20 bytes each, 9.9 GB; the rest holds 35,256 tokens. Other arguments as in `without_tokens`
    and `bytes_per_token`.
    """
    room = (1 - RESERVE) * memory - without_tokens(model, source, accum, chunk)
    return int(room / bytes_per_token(model.arch, recompute))


def without_tokens(model, source, accum, chunk):
    """Returns how many bytes training takes in each process, without what tokens keep.

    model: the GPT to train. source: the frozen one, or None. A trained weight takes 4 bytes each for itself,
    its gradient, and Adam's two averages, in float32, and 2 for its copy by autocast; one of the source 2.
    With several processes these are spread over them, but for autocast's copies, and for the weights that are
    in no block (embedding and output matrix), which stay gathered: 8 bytes with their gradients, and 2 for
    the source's. With --accum above 1 the gradients of all weights are added up before they are spread: 4
    bytes. chunk: as in prt.fit; its logits take what `chunk_size` says.
    """
    trained, frozen = (sum(p.numel() for p in m.parameters()) if m else 0 for m in (model, source))
    need = (16 * trained + 2 * frozen) / runs.world_size() + 2 * trained
    if runs.world_size() > 1:
        in_blocks = sum(p.numel() for p in model.layers.parameters())
        need += (8 + 2 * bool(source)) * (trained - in_blocks) + (4 * trained if accum > 1 else 0)
    return need + BYTES_PER_LOGIT * chunk * model.arch["vocab"]
