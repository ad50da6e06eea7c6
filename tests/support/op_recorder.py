"""What operations make and read while they run."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Witness(TorchDispatchMode):
    """Notes the shape of every tensor that an operation gives, and the storages that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.Size]] = []
        self.read: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.made.append((str(func), tensor.shape))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.read[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return out

    def most(self) -> int:
        """Elements of the largest tensor made."""
        return max(shape.numel() for _, shape in self.made)
