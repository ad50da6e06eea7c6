"""Where the harvests of a fit come from: memory or files where they are there, else the frozen VLM, of which one layer
group is held at a time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .datamodule import Batch
from .frozen_forward import logits_reading
from .harvest import LayerHarvest, Recorder, harvest
from .harvest_memory import HarvestMemory
from .harvest_store import HarvestStore
from .question_forward import Reading, Surroundings, covers, question_logits
from .streamed import Cut, GroupRecorder, Visit, streamed
from .tile_sample import LayerTiles, TileSample

LEAST_TILES = 64
"""A sample of fewer tiles is too few for the variance of a coefficient."""


class HarvestSource:
    """Gives the harvest of a batch: from memory, from disk, or by running the model."""

    def __init__(self, model: PreTrainedModel, cut: Cut, memory: HarvestMemory, store: HarvestStore | None) -> None:
        self.model, self.cut, self.memory, self.store = model, cut, memory, store
        self.questions_alone = covers(model)
        """Whether what is read of an image needs no forward but over the tokens behind it."""
        self._sample: TileSample | None = None
        self._files: list[Path] = []

    def all_layers(self, batch: Batch) -> list[LayerHarvest]:
        """The harvest of a batch, all layers at once."""
        held = self.memory.held(batch)
        if held is not None:
            return held
        if self.store is not None:
            return self.store.harvest(batch.inputs, batch.alignment)
        return harvest(self.model, batch.inputs, self.cut.tile, self.cut.canonical, batch.alignment)

    def stream(self, batch: Batch, visit: Visit, last: int = 0) -> torch.Tensor | None:
        """Hand on the harvest of a batch, group by group.

        last: of how many tokens the logits are wanted, for which the VLM runs.

        Returns: logits [B, last, vocabulary].
        """
        if not last and (held := self.memory.held(batch)) is not None:
            for number, group in enumerate(self.cut.groups):
                visit(number, [held[i] for i in group])
            return None
        if not last and self.store is not None:
            layers = self.store.harvest(batch.inputs, batch.alignment)
            for number, group in enumerate(self.cut.groups):
                visit(number, [layers[i] for i in group])
            return None
        recording = self.memory.recording(batch)

        def both(number: int, layers: list[LayerHarvest]) -> None:
            recording.add(layers)
            visit(number, layers)

        recorder = GroupRecorder(self.cut, batch.alignment, both)
        logits = streamed(self.model, batch.inputs, recorder, max(1, last))
        recording.end()
        return logits if last else None

    def sampled_stream(self, batch: Batch, visit: Visit, sample: TileSample, numbers: Sequence[int]) -> None:
        """The same, and a sample of its tiles is held. numbers: of the batch's rows."""
        sample.begin(numbers)
        self._sample = sample
        if self.store is not None:
            self._files.append(self.store.path(batch.inputs, batch.alignment))

        def both(number: int, layers: list[LayerHarvest]) -> None:
            visit(number, layers)
            sample.add(number, layers)

        self.stream(batch, both)

    def sampled(self) -> Iterator[tuple[int, list[LayerTiles]]] | None:
        """The number and the tiles of each layer group, batch by batch, of a sample that was held: all of them where
        they are in memory or files. None: too few are held."""
        sample = self._sample
        assert sample is not None
        numbers = range(len(self.cut.groups))
        if self.store is not None and not sample.complete:
            store, groups, files = self.store, self.cut.groups, self._files
            return ((n, store.tiles(path, groups[n])) for n in numbers for path in files)
        if sample.complete or sample.expected >= LEAST_TILES:
            return ((n, tiles) for n in numbers for tiles in sample.tiles(n))
        return None

    def forward_of(
        self, batch: Batch, around: Sequence[Surroundings]
    ) -> Callable[[Sequence[Reading], int], torch.Tensor]:
        """The forward of a batch whose tokens behind the images read as readings say; around: as was harvested."""

        def forward(readings: Sequence[Reading], last: int) -> torch.Tensor:
            if self.questions_alone:
                return question_logits(self.model, batch.inputs, readings, around, last)
            like = Recorder(self.cut.tile, self.cut.canonical, batch.alignment)
            return logits_reading(self.model, batch.inputs, like, readings, last)

        return forward

    def close(self) -> None:
        """Forget what is in memory."""
        self.memory.close()
        self._sample = None
