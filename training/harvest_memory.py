"""Harvests of the first batches in memory, so that the passes of a closed form run the frozen VLM once over a batch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

import torch

from kvcapsule.segments.segment import storage_bytes

from .datamodule import Batch
from .harvest import LayerHarvest

HARVEST_MEMORY = 2**30
"""Bytes of harvests that are held; further batches are harvested at every pass."""


class HarvestMemory:
    """The first batches of a loader that gives the same ones each time, with their harvests, up to a number of
    bytes."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of all harvests."""
        self.limit, self.used = limit, 0
        self._batches: list[Batch] = []
        self._harvests: dict[int, list[LayerHarvest]] = {}

    def close(self) -> None:
        """Forget everything, and hold nothing from now on."""
        self.limit = self.used = 0
        self._batches.clear()
        self._harvests.clear()

    def batches(self, loader: Iterable[Batch], count: int) -> Iterator[Batch]:
        """The first batches, those with a harvest in memory without the loader; it is begun only for further ones."""
        held = self._batches[:count]
        yield from held
        if len(held) < count:
            for index, batch in zip(range(count), loader, strict=False):
                if index >= len(held):
                    yield batch

    def harvest(self, batch: Batch, run: Callable[[Batch], list[LayerHarvest]]) -> list[LayerHarvest]:
        """The harvest of a batch, by `run` where it is not in memory. Held are those of the first batches, in order."""
        harvest = self._harvests.get(id(batch))
        if harvest is not None:
            return harvest
        harvest = run(batch)
        size = storage_bytes(tensor for layer in harvest for tensor in _tensors(layer))
        if self.used + size <= self.limit:
            self.used += size
            # The batch itself is held, so that no other can have its id.
            self._batches.append(batch)
            self._harvests[id(batch)] = harvest
        else:
            # Gaps would change the order.
            self.limit = self.used
        return harvest


def _tensors(layer: LayerHarvest) -> Iterator[torch.Tensor]:
    yield from (value for f in fields(layer) if isinstance(value := getattr(layer, f.name), torch.Tensor))
    yield from (*layer.rest.entry_tensors(), *(() if layer.frame is None else layer.frame.tensors()))
