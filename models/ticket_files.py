"""The files of tickets (models/tickets.py): masks of one bit a weight, compressed with gzip."""
import gzip
import io
import math
import os

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


def read(path):
    """Returns the dict in a compressed file. Raises ValueError if it is damaged or expands too far."""
    with open(path, "rb") as f, files.explain(f"{path}: damaged, truncated, or not a checkpoint", Exception):
        limit = 2**20 + 200 * os.fstat(f.fileno()).st_size  # masks, with a share of ones above 0.0003
        content = gzip.GzipFile(fileobj=f).read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"it expands to more than {limit} bytes")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load(path, dtype, source):
    """Returns the model of a finished ticket; dtype, source: as in weights.load.

    Raises OSError that names --source if the weights that it masks are not found.
    """
    info = read(path)
    return weights.build(info, info["arch"], unpack(info, masked_model(info, source)), dtype)


def masked_model(info, source):
    """Returns the source that a ticket masks, for images with its zero-shot head, or None if it is random."""
    if info["ticket"]["kind"] != "base":
        return None
    is_text = info["kind"] == "gpt"
    try:
        model = weights.load(source or info["source"], "base", text=is_text)
    except OSError as error:
        raise OSError(f"{error}; a ticket is a mask over these weights: name them with --source") from None
    if is_text:
        return model
    from data import images
    from models.clip import classifier
    return classifier(model, images.prompts(info["classes"], info["templates"]))


def unpack(info, source):
    """Returns the tensors of a ticket's network; info: its checkpoint. source: as masked_model returns it.

    Raises ValueError if the weights below its masks are not those of its training.
    """
    arch, ticket = info["arch"], info["ticket"]
    layers = arch["layers"] if isinstance(arch["layers"], list) else [arch["layers"]]
    if max(layers) > 8 * len(ticket["masks"]):
        raise ValueError(f"{layers} layers, but masks of {len(ticket['masks'])} bytes")
    network, head = weights.network_module(info).network, None
    if info["kind"] == "classifier":
        head = torch.empty(len(info["classes"]), arch["embed_dim"])
    with torch.device("meta"):
        check(ticket, network(info, arch, head))
    model, cause = source, f"{info['source']} or --source is not the source that it was trained on"
    if ticket["kind"] == "random":
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
    """Raises ValueError unless a ticket's settings are valid and it has a bit for each searched weight.

    model: the network on the meta device, so that no damaged file allocates more than its masks account for.
    """
    kind, keep, freeze, masks = (ticket[k] for k in ("kind", "keep", "freeze", "masks"))
    if kind not in ("random", "base") or not (0 < keep < 1 and 0 <= freeze < 1):
        raise ValueError(f"a ticket of kind {kind!r:.50}, keep {keep!r:.50}, freeze {freeze!r:.50}: the "
                         "kinds are random and base, the others shares from 0 (keep: above 0) to below 1")
    sizes = [p.numel() for name, p in model.named_parameters() if is_masked(name, p)]
    bits = sum(counts(n, ticket)[1] for n in sizes)
    if masks.dtype != torch.uint8 or masks.shape != (math.ceil(bits / 8),):
        raise ValueError(f"masks of {masks.numel()} bytes for a network that needs {math.ceil(bits / 8)}")
    if (total := sum(p.numel() for p in model.parameters())) > 10_000 * bits:
        raise ValueError(f"{total} weights, of which only {bits} have a bit in the masks")
