"""Several processes, as torchrun starts them: each has a part of the weights (FSDP2) and of every batch."""
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def join(device):
    """Joins torchrun's process group, of which only rank 0 prints."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)


def shard(device, *models):
    """Shards the models' weights over the processes; one block at a time is gathered to run it."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for model in models:
        # Of exactly this type: the parts of a ticket's ParametrizationList, a subclass, are no blocks.
        lists = [module for module in model.modules() if type(module) is torch.nn.ModuleList]
        for module in (*(block for blocks in lists for block in blocks), model):
            fully_shard(module, mesh=mesh)
