"""Tile sample: keys and values of training tiles in memory, for statistics that need bases solved from all of them.

All tiles as they are where these fit into the limit; else in 16 bits; else as many of them as fit, drawn from all
batches alike. What is drawn depends on a row's number alone, so that several ranks hold together what one would.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .harvest import LayerHarvest
from .processes import add_up

_HALF = 2
"""Bytes of an element in 16 bits."""
_SEEDS = 1_000_003
"""Between the seeds of two rows."""


class LayerTiles(NamedTuple):
    """Tiles of one layer."""

    keys: torch.Tensor
    """[E, H, T, D]."""
    values: torch.Tensor
    """[E, H, T, D]."""


class TileSample:
    """Tiles of the batches of one pass, group by group."""

    def __init__(self, layers: int, batches: int, limit: int, seed: int = 0) -> None:
        """layers: of the model. batches: of the pass, on each rank. limit: bytes, of all ranks together."""
        self.layers, self.batches, self.limit, self.seed = layers, batches, limit, seed
        self.share: float | None = None
        """Of the tiles that are held; known from the first batch on."""
        self.half = False
        self._all = 0
        self._groups: dict[int, list[list[LayerTiles]]] = {}
        self._drawn: torch.Tensor | None = None

    @property
    def expected(self) -> float:
        """Tiles that all ranks hold together, about: the same number on each of them."""
        return self._all * (self.share or 0.0)

    @property
    def complete(self) -> bool:
        """Whether all tiles are held."""
        return self.share == 1.0

    def begin(self, numbers: Sequence[int]) -> None:
        """The next batch, of rows with these numbers."""
        self._numbers, self._drawn = numbers, None

    def add(self, number: int, layers: Sequence[LayerHarvest]) -> None:
        """Take in a layer group's tiles of the batch that began."""
        first = layers[0]
        if self.share is None:
            self._plan(first)
        if self._drawn is None:
            self._drawn = self._draw(first.owner)
        if not bool(self._drawn.any()):
            return
        held = [LayerTiles(*map(self._held, (layer.keys, layer.values))) for layer in layers]
        self._groups.setdefault(number, []).append(held)

    def tiles(self, number: int) -> Iterator[list[LayerTiles]]:
        """The tiles of a layer group, batch by batch: for each of its layers."""
        yield from self._groups.get(number, ())

    def _plan(self, layer: LayerHarvest) -> None:
        # Of the first batch on all ranks, so that they hold the same share.
        sizes = [layer.keys.numel() + layer.values.numel(), len(layer.keys)]
        first = torch.tensor(sizes, dtype=torch.int64, device=layer.keys.device)
        add_up(first)
        elements, self._all = (count * self.batches for count in first.tolist())
        elements, width = elements * self.layers, layer.keys.dtype.itemsize
        self.half = elements * width > self.limit and width > _HALF
        self.share = min(1.0, self.limit / (elements * (_HALF if self.half else width)))

    def _draw(self, owner: torch.Tensor) -> torch.Tensor:
        assert self.share is not None
        drawn = torch.ones(len(owner), dtype=torch.bool)
        if self.share < 1:
            rows = owner.tolist()
            for row in set(rows):
                random = torch.Generator().manual_seed(self.seed + _SEEDS * self._numbers[row])
                drawn[[i for i, of in enumerate(rows) if of == row]] = (
                    torch.rand(rows.count(row), generator=random) < self.share
                )
        return drawn

    def _held(self, tiles_EHTD: torch.Tensor) -> torch.Tensor:
        if self.complete and not self.half:
            return tiles_EHTD
        assert self._drawn is not None
        drawn = tiles_EHTD[self._drawn.to(tiles_EHTD.device)]
        return _in_half(drawn) if self.half else drawn


def _in_half(x: torch.Tensor) -> torch.Tensor:
    """In float16, or in bfloat16 where numbers are too large for that."""
    largest = torch.finfo(torch.float16).max
    return x.to(torch.float16 if not x.numel() or float(x.abs().amax()) <= largest else torch.bfloat16)
