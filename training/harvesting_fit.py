"""What every fit reads: batches, and their harvests, which a frozen VLM gives that is no part of the fit's state."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from kvcapsule.cli.progress import tracked
from kvcapsule.training_footprint import SAMPLE_BYTES
from kvcapsule.vlm.placement import on_several_devices

from .datamodule import Batch
from .freed_memory import give_back, trim
from .harvest import LayerHarvest
from .harvest_memory import HarvestMemory
from .harvest_source import HarvestSource
from .harvest_store import HarvestStore
from .processes import add_up, keep_greatest
from .stage_lines import with_lines
from .streamed import Cut, Visit
from .task import R, Task
from .tile_sample import LayerTiles, TileSample


def trimmed(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; what one of them freed goes back to the system before the next."""
    for batch in batches:
        yield batch
        trim()


class SumsOfGroups(Protocol):
    """What a harvest pass is for."""

    numbers: Sequence[int]
    """Of the rows of the present batch."""

    def add(self, number: int, layers: list[LayerHarvest]) -> None:
        """Take in a layer group of it."""


class HarvestingFit(L.LightningModule, Generic[R]):
    """LightningModule with a task, whose model it neither saves nor moves nor trains."""

    reuses_harvests: ClassVar[bool] = False
    """Whether `prepare` makes several passes over the same batches, whose harvests are then held in memory."""

    def __init__(self, task: Task[R]) -> None:
        super().__init__()
        # In a tuple, so that Lightning neither saves nor moves nor trains the model.
        self._frozen = (task,)

    @cached_property
    def harvests(self) -> HarvestSource:
        task, recipe = self.task, self.task.recipe
        canonical, store = recipe.codec.canonical_frame, None
        if recipe.harvests is not None:
            store = HarvestStore(Path(recipe.harvests), task.model, task.tile, canonical, lambda line: self.show(line))
        # Processes that share a model out run it equally often, whatever would fit into the memory of one.
        memory = HarvestMemory(SAMPLE_BYTES if self.reuses_harvests and not task.sharded else 0)
        return HarvestSource(task.model, Cut(task.tile, canonical, self.groups), memory, store)

    @property
    def groups(self) -> Sequence[range]:
        """Layers that are coded together: each by itself, unless a family has it otherwise."""
        return [range(i, i + 1) for i in range(self.task.layers)]

    @property
    def task(self) -> Task[R]:
        """The recipe of the run and what it names, loaded: model, data, geometry."""
        return self._frozen[0]

    @cached_property
    def devices(self) -> list[torch.device]:
        """Where the keys of each layer lie, and so its sums and its codec."""
        model, devices = self.task.model, list[torch.device]()
        if not on_several_devices(model):
            return [model.device] * self.task.layers
        batch = next(iter(self.task.data.first_epoch()))
        self.stream(batch, lambda number, layers: devices.extend(layer.keys.device for layer in layers))
        return devices

    def batches(self, count: int, title: str) -> Iterator[Batch]:
        """This rank's share of the first steps' rows, those of an epoch at most: the same batches at every call."""
        give_back()
        loader = self.task.data.first_epoch()
        count = min(count, self.task.data.epoch_steps)
        batches = trimmed(self.harvests.memory.batches(loader, count))
        tracked_batches = tracked(batches, title, count, self.task.console)
        return with_lines(
            self.task.data.rows_read.noted(tracked_batches), title, count, self.held().get(title), self.show
        )

    def held(self) -> dict[str, int]:
        """Bytes that stages of the training hold beside the model and a batch, by their titles, as far as a family
        knows them."""
        return {}

    def numbers(self, step: int, count: int) -> list[int]:
        """Of this rank's rows of a step among those of all ranks and steps: the same on any number of ranks."""
        world = 1 if self._trainer is None else self.trainer.world_size
        return [step * self.task.recipe.batch + self.global_rank + i * world for i in range(count)]

    def harvest(self, batch: Batch) -> list[LayerHarvest]:
        """Keys, values and queries of every layer: from memory or from disk where they are there, else by the frozen
        VLM."""
        return self.harvests.all_layers(batch)

    def stream(self, batch: Batch, visit: Visit) -> None:
        """The same, group by group: one group is in memory at a time."""
        self.harvests.stream(batch, visit)

    def harvest_pass(self, title: str, sums: "SumsOfGroups") -> None:
        """Hand every layer group of the first batches (--moment_batches) to `sums`, and hold a sample of their tiles
        for `each_tiles`."""
        count = min(self.task.recipe.moment_batches, self.task.data.epoch_steps)
        sample = TileSample(self.task.layers, count, SAMPLE_BYTES, self.task.recipe.seed)
        for step, batch in enumerate(self.batches(count, title)):
            sums.numbers = self.numbers(step, len(batch.answers))
            self.harvests.sampled_stream(batch, sums.add, sample, sums.numbers)

    def each_tiles(self, title: str, use: Callable[[int, Sequence[LayerTiles]], None]) -> None:
        """Call `use` with the number of a layer group and the tiles of its layers, batch by batch of the sample that
        `harvest_pass` held; where that holds too few, with all tiles, by the frozen VLM."""
        sampled = self.harvests.sampled()
        if sampled is not None:
            for number, tiles in sampled:
                use(number, tiles)
            return

        def visit(number: int, layers: list[LayerHarvest]) -> None:
            use(number, [LayerTiles(layer.keys, layer.values) for layer in layers])

        for batch in self.batches(self.task.recipe.moment_batches, title):
            self.stream(batch, visit)

    @rank_zero_only
    def show(self, what: object) -> None:
        self.task.console.print(what, highlight=False)

    def reduce(self, sums: nn.Module, greatest: bool = False) -> None:
        """Add up the buffers of all ranks, or take the greatest of each."""
        (keep_greatest if greatest else add_up)(*sums.buffers())
