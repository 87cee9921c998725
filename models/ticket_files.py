"""The files of tickets (models/tickets.py): masks of one bit a weight, compressed with gzip."""
import gzip
import io
import math

import numpy as np
import torch
from torch.nn.utils.parametrize import ParametrizationList

from data import files
from models import weights
from models.tickets import TopK, counts, is_masked, masked_weights


def save(path, content, model, state):
    """Writes a finished ticket; content: its checkpoint without weights. state: those of `model`, scores."""
    masks = {name.replace("parametrizations.", ""): TopK.apply(state[f"{name}.original"], module[0].k)
             for name, module in model.named_modules() if isinstance(module, ParametrizationList)}
    bits = torch.cat([mask for _, mask in sorted(masks.items())]).bool()
    ticket = content["ticket"] | dict(masks=torch.from_numpy(np.packbits(bits.numpy())))
    file = io.BytesIO()
    torch.save(content | dict(ticket=ticket), file)
    with files.atomic(path) as f:
        f.write(gzip.compress(file.getvalue(), mtime=0))  # without the time: the same bytes


def load(info, dtype, source):
    """Returns the model of a finished ticket; info: its checkpoint. dtype, source: as in weights.load.

    Raises OSError that names --source if the weights that it masks are not found.
    """
    masked = weights.load_base(source or info["source"], info) if info["ticket"]["kind"] == "base" else None
    return weights.build(info, info["arch"], unpack(info, masked), dtype)


def unpack(info, source):
    """Returns the tensors of a ticket's network; info: its checkpoint. source: that it masks, or None.

    Raises ValueError if the weights below its masks are not those of its training.
    """
    arch, ticket, network = info["arch"], info["ticket"], weights.network_module(info).network
    with torch.device("meta"):
        head = torch.empty(len(info["classes"]), arch["embed_dim"]) if info["kind"] == "classifier" else None
        check(ticket, network(info, arch, head))
    model, cause = source, f"{info['source']} or --source is not the source that it was trained on"
    if ticket["kind"] == "random":
        head = None if head is None else torch.empty_like(head, device="cpu")
        model, cause = network(info, arch, head), "another version of torch, or of this code, made the file"
    masked, checksum = masked_weights(model, ticket)
    if checksum != ticket["checksum"]:
        raise ValueError(f"its masks are for other weights than those it gets here: {cause}")
    tensors, sizes = model.state_dict(), [part.size for part in masked.values()]
    bits = np.unpackbits(ticket["masks"].numpy())[:sum(sizes)]
    for (name, part), mask in zip(masked.items(), torch.from_numpy(bits).float().split(sizes)):
        tensors[name] = part.masked(mask)
    return tensors


def check(ticket, model):
    """Raises ValueError unless a ticket has a bit for each searched weight.

    model: the network on the meta device, so that no damaged file allocates more than its masks account for.
    """
    sizes = [p.numel() for name, p in model.named_parameters() if is_masked(name, p)]
    masks, bits = ticket["masks"], sum(counts(n, ticket)[1] for n in sizes)
    if masks.dtype != torch.uint8 or masks.shape != (math.ceil(bits / 8),):
        raise ValueError(f"masks of {masks.numel()} bytes for a network that needs {math.ceil(bits / 8)}")
    if (total := sum(p.numel() for p in model.parameters())) > 2**24 + 100 * bits:
        raise ValueError(f"{total} weights, of which only {bits} have a bit in the masks")
