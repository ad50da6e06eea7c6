"""Streamed harvest: a forward of the frozen VLM that hands on each layer group's harvest as the group ends, so that one
group's keys and values are in memory and not those of all layers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed

from .harvest import Alignment, LayerHarvest, Recorder


class Cut(NamedTuple):
    """How a harvest is cut into tiles and layer groups."""

    tile: int
    """Visual tokens of a tile."""
    canonical: bool
    """Whether keys are in their tiles' own frames."""
    groups: Sequence[range]
    """Numbers of the layers that are handed on together, among those with full attention: all of them in order."""


Visit = Callable[[int, list[LayerHarvest]], None]
"""Called with the number of a layer group and the harvest of its layers."""


class GroupRecorder(Recorder):
    """Recorder that holds one layer group at a time."""

    def __init__(self, cut: Cut, alignment: Alignment, visit: Visit) -> None:
        super().__init__(cut.tile, cut.canonical, alignment)
        self.groups, self.visit, self.done = cut.groups, visit, 0

    def compress(self, prefill: LayerPrefill) -> Compressed:
        compressed = super().compress(prefill)
        if len(self.layers) == len(self.groups[self.done]):
            layers, self.layers = self.layers, []
            self.visit(self.done, layers)
            self.done += 1
        return compressed


@torch.no_grad()
def streamed(model: PreTrainedModel, inputs: BatchFeature, recorder: GroupRecorder, last: int = 1) -> torch.Tensor:
    """Run the frozen model over a batch; returns the logits [B, last, vocabulary] of the last tokens."""
    with attach(model):
        cache = CapsuleCache(model.config, recorder)
        logits: torch.Tensor = model(**inputs.to(model.device), **cache_argument(cache), logits_to_keep=last).logits
    # The cache, which lives until cycles of references are looked for, holds on to nothing that was visited.
    recorder.visit = _nothing
    return logits


def _nothing(number: int, layers: list[LayerHarvest]) -> None:
    """In place of a visit."""
