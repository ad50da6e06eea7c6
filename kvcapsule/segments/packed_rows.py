"""Stored rows of keys or values, [E, H, M, D]: a tensor, or packed rows, which hold them in another form.

Each form of packed rows has a file of its own in this folder. Shape suffixes are those of kvcapsule.segments.segment.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Packed(Protocol):
    """Interface of packed rows: rows whose stored form is not the tensor that attention multiplies."""

    @property
    def shape(self) -> torch.Size:
        """[E, H, M, D], the shape of the unpacked rows."""

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Unpacked rows [E, H, M, D]; or [E, S, M, D] if neighbouring heads share rows, stored once per group."""

    def select(self, index: torch.Tensor) -> "Packed":
        """The rows of the entries `index`."""

    def to(self, device: torch.device | str) -> "Packed":
        """The rows with their own tensors on `device`; shared parameters stay where they are."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors stored for these rows alone."""

    def shared(self) -> tuple[torch.Tensor, ...]:
        """The parameters that unpacking needs, shared by all sequences."""


@runtime_checkable
class AffineRows(Packed, Protocol):
    """Interface of packed rows with elements scale * code + midpoint, where scale and midpoint are per channel.

    A product can then be taken with the codes, and scale and midpoint applied to its operand and result. Codes are
    centred on 0, so that their sums keep precision beside the midpoint.
    """

    scale: torch.Tensor
    """[E, H, 1, D]."""
    midpoint: torch.Tensor
    """[E, H, 1, D]."""
    lanes: int
    """P: number of code planes."""

    def planes(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The codes as P planes [E, H, D, n]: token t is column t // P of plane t % P; columns after the last token are
        padding."""


Rows = torch.Tensor | Packed


def read_rows(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a tensor [E, H, M, D], unpacked if need be."""
    by_set = read_sets(rows, dtype)
    return (
        by_set.repeat_interleave(rows.shape[1] // by_set.shape[1], dim=1) if by_set.shape[1] < rows.shape[1] else by_set
    )


def read_sets(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a tensor [E, S, M, D]: rows that neighbouring heads share appear once."""
    return rows.to(dtype) if isinstance(rows, torch.Tensor) else rows.read(dtype)


def stored_tensors(rows: Rows) -> tuple[torch.Tensor, ...]:
    """The tensors stored for these rows alone."""
    return (rows,) if isinstance(rows, torch.Tensor) else rows.tensors()
