"""Several processes, as torchrun starts them: each has a part of the weights (FSDP2) and of every batch."""
import functools
import os
import sys

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def join(device):
    """Joins torchrun's process group, of which only rank 0 prints."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)


def sharding(device):
    """Returns a function that spreads a module's weights over the processes, which gather them to run it."""
    return functools.partial(fully_shard, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
