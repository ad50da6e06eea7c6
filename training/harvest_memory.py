"""Harvests of all batches in memory, where they fit, so that the frozen VLM runs once over a batch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

import torch

from kvcapsule.segments.segment import storage_bytes

from .datamodule import Batch
from .harvest import LayerHarvest


class HarvestMemory:
    """The batches of a loader that gives the same ones each time, with their harvests: all of them, or none where the
    first shows that they would take more than a number of bytes."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of all harvests."""
        self.limit, self.used, self.count = limit, 0, 1
        self._batches: list[Batch] = []
        self._harvests: dict[int, list[LayerHarvest]] = {}

    def close(self) -> None:
        """Forget everything, and hold nothing from now on."""
        self.limit = self.used = 0
        self._batches.clear()
        self._harvests.clear()

    def batches(self, loader: Iterable[Batch], count: int) -> Iterator[Batch]:
        """The first batches, those with a harvest in memory without the loader; it is begun only for further ones."""
        self.count = max(self.count, count)
        held = self._batches[:count]
        yield from held
        if len(held) < count:
            for index, batch in zip(range(count), loader, strict=False):
                if index >= len(held):
                    yield batch

    def held(self, batch: Batch) -> list[LayerHarvest] | None:
        """The harvest of a batch; None where it is not in memory."""
        return self._harvests.get(id(batch))

    def recording(self, batch: Batch) -> "Recording":
        """What holds a batch's harvest as its layers come."""
        return Recording(self, batch)

    def keep(self, batch: Batch, layers: list[LayerHarvest], size: int) -> None:
        self.used += size
        # The batch itself is held, so that no other can have its id.
        self._batches.append(batch)
        self._harvests[id(batch)] = layers


class Recording:
    """The harvest of one batch, layer by layer, until it is too large."""

    def __init__(self, memory: HarvestMemory, batch: Batch) -> None:
        self.memory, self.batch, self.size = memory, batch, 0
        self.layers: list[LayerHarvest] | None = [] if memory.limit else None

    def add(self, layers: Sequence[LayerHarvest]) -> None:
        if self.layers is None:
            return
        self.layers += layers
        # Layers share some tensors.
        self.size = storage_bytes(tensor for layer in self.layers for tensor in _tensors(layer))
        memory = self.memory
        left = max(1, memory.count - len(memory._batches))
        if memory.used + self.size * left > memory.limit:
            self.layers = None
            memory.close()

    def end(self) -> None:
        """The last layer was added: keep the harvest, if it fits."""
        if self.layers:
            self.memory.keep(self.batch, self.layers, self.size)


def _tensors(layer: LayerHarvest) -> Iterator[torch.Tensor]:
    yield from (value for f in fields(layer) if isinstance(value := getattr(layer, f.name), torch.Tensor))
    yield from (*layer.rest.entry_tensors(), *(() if layer.frame is None else layer.frame.tensors()))
