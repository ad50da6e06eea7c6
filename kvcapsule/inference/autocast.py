"""Under torch.autocast a cache holds what attention would read: keys, values and queries in autocast's precision.

The codecs, the policies and the kernels then run as for a model of that precision: autocast chooses operation by
operation, and would hand them keys and values of two precisions.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def as_attention_reads(x: torch.Tensor) -> torch.Tensor:
    """A tensor of floating-point numbers in autocast's precision, where autocast is on; else as it is."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _is_on(x.device) else x


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """While the block lasts, operations on this kind of device run in the precision of their inputs."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else nullcontext()


def _is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
