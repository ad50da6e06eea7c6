"""Tensors as the flat arrays that compiled kernels take; whoever counts what is read is told here, for PyTorch does not see it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

_watching: list[Callable[[torch.Tensor], None]] = []


def told(tensors: Iterable[torch.Tensor]) -> None:
    """Tells of tensors that kernels read as arrays made before."""
    for tell in _watching:
        for tensor in tensors:
            tell(tensor)


def flat(tensor: torch.Tensor) -> np.ndarray:
    """What lies in memory from the first element to the last."""
    for tell in _watching:
        tell(tensor)
    if tensor.is_contiguous():
        dense: np.ndarray = tensor.detach().numpy().reshape(-1)
        return dense
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return torch.as_strided(tensor.detach(), (length,), (1,)).numpy()


@contextmanager
def watched(tell: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Tell of every tensor that a kernel is about to read or to write, whole."""
    _watching.append(tell)
    try:
        yield
    finally:
        _watching.remove(tell)
