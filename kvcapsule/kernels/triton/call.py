"""One call of attention: what its segments have in common, and the partial results that each launch leaves."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .arguments import Product
from .plan import UnitIndex


class Call(NamedTuple):
    """What all segments of one call have in common."""

    query: torch.Tensor
    """[B, H * G, Q, D], channels dense."""
    scale: float
    """Factor of the scores."""
    heads: int
    """H."""

    @property
    def batch(self) -> int:
        """B."""
        return self.query.shape[0]

    @property
    def queries(self) -> int:
        """Q."""
        return self.query.shape[2]

    @property
    def rows(self) -> int:
        """R."""
        return self.query.shape[1] // self.heads * self.queries

    @property
    def product(self) -> Product:
        """How the kernels multiply matrices."""
        return Product.of(self.query.dtype)

    def empty(self, *shape: int) -> torch.Tensor:
        """fp32 on the query's device."""
        return torch.empty(shape, dtype=torch.float32, device=self.query.device)


class Part(NamedTuple):
    """Partial results of one segment: `splits` for each of its units, unit by unit."""

    units_of_slots: UnitIndex
    units: int
    splits: int


class Producer(NamedTuple):
    """A launch, or several, that computes the partial results of its parts, one part after the other."""

    parts: list[Part]
    write: Callable[[torch.Tensor, torch.Tensor], None]
    """Fills out [P, R, D] and lse [P, R] (base 2)."""

    @property
    def results(self) -> int:
        """P."""
        return sum(part.units * part.splits for part in self.parts)
