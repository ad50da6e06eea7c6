"""One call of attention, and what its parts hand on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .loads import precision
from .plan import Index


class Call(NamedTuple):
    """What all segments of one call have in common."""

    query: torch.Tensor
    """[B, H * G, Q, D], channels dense."""
    scale: float
    heads: int
    """H."""

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def rows(self) -> int:
        """R."""
        return self.query.shape[1] // self.heads * self.queries

    @property
    def constants(self) -> dict[str, Any]:
        """What every attention kernel is compiled for."""
        return {"R": self.rows, "PRECISION": precision(self.query.dtype)}

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.query.device)


class Part(NamedTuple):
    """Partial results of one segment: `splits` for each of its units, unit by unit."""

    places: Index
    units: int
    splits: int


class Producer(NamedTuple):
    """What leaves the partial results of its parts, one part after the other."""

    parts: list[Part]
    write: Callable[[torch.Tensor, torch.Tensor], None]
    """Fills out [P, R, D] and lse [P, R] (base 2)."""

    @property
    def results(self) -> int:
        """P."""
        return sum(part.units * part.splits for part in self.parts)
