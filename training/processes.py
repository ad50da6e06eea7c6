"""The processes of a run: what they add up and hand to each other, and how many bytes that is.

Of a run in one process all of it is what it is given. Every process must make these calls in the same order.
"""

import torch
from torch import distributed


class Exchanged:
    """Bytes of tensors that this process gave to the others, whatever a backend sends for them."""

    bytes = 0

    def begin(self) -> None:
        """Count from here on."""
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        self.bytes += tensor.numel() * tensor.element_size()


EXCHANGED = Exchanged()
"""By this process, in its present run."""


def count() -> int:
    """Processes of the run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def add_up(*tensors: torch.Tensor) -> None:
    """Make each tensor, in place, the sum of those of all processes."""
    _reduce(tensors, distributed.ReduceOp.SUM)


def keep_greatest(*tensors: torch.Tensor) -> None:
    """Make each tensor, in place, the elementwise maximum of those of all processes."""
    _reduce(tensors, distributed.ReduceOp.MAX)


def _reduce(tensors: tuple[torch.Tensor, ...], operation: "distributed.ReduceOp.RedOpType") -> None:
    if count() == 1:
        return
    for tensor in tensors:
        EXCHANGED.add(tensor)
        distributed.all_reduce(tensor, op=operation)


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes, which may differ in shape, on the device of this one's."""
    if count() == 1:
        return [tensor]
    EXCHANGED.add(tensor)
    of_all: list[torch.Tensor] = [tensor] * count()
    distributed.all_gather_object(of_all, tensor.cpu())
    return [of_one.to(tensor.device) for of_one in of_all]


def ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The scalar numerator / denominator, both summed over all processes: the mean of what the processes get is that.

    So the mean of its gradients, which data-parallel training takes, is the gradient that one process with all rows
    would have. The denominator gets no gradient.
    """
    total = denominator.detach().to(numerator.device, copy=True)
    add_up(total)
    return numerator * count() / total
