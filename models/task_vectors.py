"""Task arithmetic (Ilharco et al. 2023): what tuning changed in the source's weights, added to a base's.

The sum is one model, which runs as fast as the base. It needs a base of the source's architecture, and means
something where the base's weights are still near the source's, as after more pretraining of the source.
"""
import contextlib
import copy
import io

import torch

from models import weights


def shapes(model):
    """Returns name -> shape of a model's weights, without its buffers."""
    return {name: p.shape for name, p in model.named_parameters()}


@torch.no_grad()
def edit(base, source, tuned_source, names):
    """Returns a copy of the base with the weights W_base + (W_tuned - W_source), or None if they do not fit.

    base, source, tuned_source: models on the CPU. They fit if their weights have the same names and shapes.
    The copy has the base's dtype and buffers, such as BatchNorm's statistics and a zero-shot head.
    names: the three files, folders, or Hub ids that weights.load read them from. They are read again, since
    in bfloat16 most of the difference would be lost: it is computed in float32, one weight at a time.
    """
    if not shapes(base) == shapes(source) == shapes(tuned_source):
        return None
    is_text = tuned_source.info["kind"] == "gpt"
    with contextlib.redirect_stdout(io.StringIO()):  # what there is to say was printed when they were loaded
        loaded = [weights.load(name, None, is_text, None, source=names[1]) for name in names]
    stored, edited = [dict(model.named_parameters()) for model in loaded], copy.deepcopy(base)
    for name, p in edited.named_parameters():  # of a CLIP's two towers, the classifier has one
        base_weight, source_weight, tuned_weight = (parameters[name].float() for parameters in stored)
        p.copy_(base_weight + (tuned_weight - source_weight))
    return edited
