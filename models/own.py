"""A network of your own for images, a function in a file: --source net.py:old, --base net.py:new.

The function takes nothing and returns a module that maps uint8 images [B, 3, h, w] to logits [B, L] of the
data's classes, in their order. Its attribute image_size is the h and w that images are read with.
"""
import importlib.util
import sys
from pathlib import Path

import torch

from models import flags


def load(name):
    """Returns the module of `name`, file.py:function, with `arch` and `info` as other models have them.

    Raises PermissionError if the command does not have this name, since the file is run: a checkpoint, which
    also has it, must not decide that. Raises ValueError if it is no such module.
    """
    path, _, function = name.rpartition(":")
    if name not in flags.NAMED:
        raise PermissionError(f"{name} is code, which is run only if the command names it: --source {name}, "
                              "or another path, if it has moved")
    spec = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).parent.absolute()))  # for what it imports
    spec.loader.exec_module(module)
    if not callable(make := getattr(module, function, None)):
        raise ValueError(f"{path} has no function {function}")
    network = make()
    if not isinstance(network, torch.nn.Module) or type(getattr(network, "image_size", None)) is not int:
        raise ValueError(f"{name} must return a torch.nn.Module with an attribute image_size, in pixels, not "
                         f"{type(network).__name__}")
    network.arch, network.info = dict(net=name, image_size=network.image_size), dict(kind="classifier")
    return network.eval()


@torch.no_grad()
def checked(network, classes):
    """Returns a network of your own. Raises ValueError unless its logits are those of so many classes."""
    size = network.arch["image_size"]
    try:
        shape = torch.as_tensor(network(torch.zeros(1, 3, size, size, dtype=torch.uint8))).shape
    except Exception as error:
        error.add_note(f"{network.arch['net']} was called on one image, uint8 [1, 3, {size}, {size}]")
        raise
    if shape != (1, len(classes)):
        raise ValueError(f"{network.arch['net']}: its output for one image has shape {[*shape]}, not [1, "
                         f"{len(classes)}] for the data's classes")
    return network


def restored(info, arch, tensors):
    """Returns the reward in a checkpoint; the arguments are those of weights.build."""
    network = load(arch["net"])
    network.load_state_dict(tensors)
    network.info = info
    return network.requires_grad_(True)
