"""The bytes that a call of attention reads and writes, counted operation by operation."""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcapsule.kernels.backend import backend_for
from kvcapsule.kernels.cpu.attend import split
from kvcapsule.segments.segment import Segment

_MANY = 2**16
"""Contiguous runs of a tensor above which its span from the first to the last element counts."""


class Touched(NamedTuple):
    """Bytes that one attention call reads and writes."""

    stored: int
    """Bytes that it reads of the stored tensors, each byte once."""
    traffic: int
    """Bytes that all its operations read and write, intermediate results included: more than `stored` where tensors are
    copied or repeated.

    An upper bound of the traffic of the memory bus: small tensors stay in caches.
    """


def count(call: Callable[[], Any], held: Iterable[torch.Tensor], by_kernels: Iterable[torch.Tensor] = ()) -> Touched:
    """Run `call` and count. Kernels in Triton, which PyTorch does not dispatch, are not seen.

    Args:
        call: what is counted.
        held: tensors whose bytes count as stored.
        by_kernels: what the CPU's kernels read whole in the call, unseen by PyTorch.
    """
    with _Counter(held) as counter:
        call()
    for tensor in by_kernels:
        counter.see(tensor)
    return Touched(sum(_length(ranges) for ranges in counter.read.values()), counter.traffic)


def read_by_kernels(query: torch.Tensor, segments: Sequence[Segment], scale: float) -> list[torch.Tensor]:
    """The query, and all tensors of the segments that the CPU's kernels cover; nothing where they do not run."""
    if backend_for(query.device.type) != "cpu":
        return []
    covered = [segment for segment, args in split(query, segments, scale) if args is not None]
    return [query, *(t for s in covered for t in (*s.entry_tensors(), *s.parameter_tensors()))] if covered else []


class _Counter(TorchDispatchMode):
    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: dict[int, list[tuple[int, int]]] = {
            t.untyped_storage().data_ptr(): [] for t in held if t.untyped_storage().nbytes()
        }
        self.traffic = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        places = {x.untyped_storage().data_ptr() for x in inputs}
        if func.is_view or (
            outputs and all(x.untyped_storage().data_ptr() in places for x in outputs) and not func._schema.is_mutable
        ):
            return out
        for x in inputs:
            self.see(x)
        self.traffic += sum(_elements(x) * x.itemsize for x in outputs)
        return out

    def see(self, x: torch.Tensor) -> None:
        """A tensor is read."""
        self.traffic += _elements(x) * x.itemsize
        if (ranges := self.read.get(x.untyped_storage().data_ptr())) is not None:
            ranges.extend(_ranges(x))


def _elements(x: torch.Tensor) -> int:
    """Number of different elements: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _ranges(x: torch.Tensor) -> list[tuple[int, int]]:
    """The bytes of its storage that a tensor covers, as [begin, end) each."""
    dense = sorted(
        (int(stride), int(size)) for size, stride in zip(x.shape, x.stride(), strict=True) if stride and size > 1
    )
    run = 1
    while dense and dense[0][0] == run:
        run *= dense.pop(0)[1]
    if x.numel() == 0:
        return []
    begins = [int(x.storage_offset())]
    if prod(size for _, size in dense) > _MANY:
        end = begins[0] + run + sum(stride * (size - 1) for stride, size in dense)
        return [(begins[0] * x.itemsize, end * x.itemsize)]
    for stride, size in dense:
        begins = [begin + i * stride for begin in begins for i in range(size)]
    return [(begin * x.itemsize, (begin + run) * x.itemsize) for begin in begins]


def _length(ranges: list[tuple[int, int]]) -> int:
    """Bytes of the union."""
    total, covered = 0, 0
    for begin, end in sorted(ranges):
        begin = max(begin, covered)
        if end > begin:
            total, covered = total + end - begin, end
    return total
