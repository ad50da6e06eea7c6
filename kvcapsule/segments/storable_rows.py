"""Rows that can be taken apart into tensors and built again from them, which is what storing a segment asks for."""

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import torch

from .packed_rows import Packed, Rows, stored_tensors


@runtime_checkable
class StorableRows(Packed, Protocol):
    """Interface of packed rows that can be built from tensors such as theirs."""

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Self:
        """Rows like these, of the tensors that their `tensors()` will return: the same forms but for the number of
        entries, which comes first in each. What all sequences share is that of these rows."""


def storable(rows: Rows) -> bool:
    """Whether `with_stored` can build rows like these."""
    return type(rows) is torch.Tensor or isinstance(rows, StorableRows)


def with_stored(rows: Rows, tensors: Sequence[torch.Tensor]) -> Rows:
    """Rows like `rows` of other stored tensors, in the order of kvcapsule.segments.packed_rows.stored_tensors.

    Raises:
        TypeError: unless they are `storable`.
    """
    if isinstance(rows, torch.Tensor):
        (tensor,) = tensors
        return tensor
    if not isinstance(rows, StorableRows):
        raise TypeError(f"{type(rows).__name__} has no with_tensors, by which rows are built from stored tensors.")
    return rows.with_tensors(tensors)


def join_rows(pieces: Sequence[Rows]) -> Rows:
    """The entries of all pieces, one after the other; they share their parameters.

    Raises:
        TypeError: unless they are `storable`.
    """
    return with_stored(pieces[0], [torch.cat(parts) for parts in zip(*map(stored_tensors, pieces), strict=True)])
