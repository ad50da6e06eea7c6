"""A frozen model of which each process holds a share: of every layer's weights, whose other shares the processes give
each other while the layer runs (FSDP, arXiv 2304.11277).

Lightning's own FSDP strategy shares out what is trained, and asks for a GPU; here that is small, and it is the frozen
model that is large. All processes must run the model equally often.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from . import processes


def share_out(model: PreTrainedModel, device: torch.device) -> None:
    """Leave this process its share of the weights, on its device, layer by layer.

    Args:
        model: whole, anywhere.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (processes.count(),))
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    # What is in no layer, such as embeddings, is given back after each forward, too.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
