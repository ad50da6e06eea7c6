"""Question forward: a forward of the frozen VLM over the tokens behind the images alone.

What stands before them does not change with what is stored of the images: keys and values of text, and of visual tokens
in no tile, are those of the harvest, and tiles are read as a codec's segments. Time and memory are those of the
question and its answer, however large the images are. For models all of whose layers have full attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.forward_context import ForwardContext
from kvcapsule.inference.transformers_api import cache_argument, prompt_positions
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.geometry import KVGeometry

from .harvest import LayerHarvest, Recorder


class Surroundings(NamedTuple):
    """What a layer's queries read beside the tiles, as it was harvested."""

    rest: Segment
    visible: torch.Tensor
    """[B, Q, R]."""
    place: torch.Tensor
    """[B, R]."""

    @classmethod
    def of(cls, layer: LayerHarvest) -> "Surroundings":
        if layer.place is None:
            raise ValueError("the harvest does not say where the tokens of its queries are.")
        return cls(layer.rest, layer.visible, layer.place)

    def with_tokens(self, keys: torch.Tensor, values: torch.Tensor) -> Segment:
        """The rest with keys and values [B, H, Q, D] of the tokens behind the images in their places."""
        new = self.place[:, None, :, None] >= 0
        index = self.place.clamp_min(0)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        mixed = []
        for tokens, rows in zip((keys, values), (self.rest.keys, self.rest.values), strict=True):
            assert isinstance(rows, torch.Tensor)
            mixed.append(torch.where(new, tokens.gather(2, index), rows))
        return Segment(mixed[0], mixed[1], self.rest.owner, mask=self.rest.mask)


class Reading(Protocol):
    """How the queries of one layer read its tiles."""

    def read(self, query: torch.Tensor, rest: Segment, visible: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention's output [B, H * G, Q, D] over the tiles and the rest, of which `visible` says what is seen."""


class SegmentReading:
    """Queries that read a segment; gradients reach whatever it was made of."""

    def __init__(self, tiles: Segment) -> None:
        self.tiles = tiles

    def read(self, query: torch.Tensor, rest: Segment, visible: torch.Tensor, scale: float) -> torch.Tensor:
        return attend(query, [self.tiles, rest], scale, visible)


class DecodedReading(SegmentReading):
    """Queries that read a segment by what it decodes to: with many queries less work than through its maps. Without
    gradients, and nothing decoded is kept."""

    def read(self, query: torch.Tensor, rest: Segment, visible: torch.Tensor, scale: float) -> torch.Tensor:
        return attend(query, [decoded(self.tiles), rest], scale, visible)


@torch.no_grad()
def decoded(tiles: Segment) -> Segment:
    """Tiles as raw keys and values in the same frames."""
    keys, values = replace(tiles, frame=None).materialize()
    return Segment(keys, values, tiles.owner, bias=tiles.bias, frame=tiles.frame, mask=tiles.mask)


_LOOK_AHEAD = {"paligemma"}
"""Types of models whose images attend to the question behind them."""


def covers(model: PreTrainedModel) -> bool:
    """Whether a question forward gives a model's logits: not where images attend to the question, or where layers hold
    a state of all tokens, as those with a window or linear attention do."""
    if model.config.model_type in _LOOK_AHEAD:
        return False
    cache = CapsuleCache(model.config, Recorder(1))
    return all(isinstance(layer, CapsuleLayer) for layer in cache.layers)


def question_logits(
    model: PreTrainedModel,
    inputs: BatchFeature,
    readings: Sequence[Reading],
    around: Sequence[Surroundings],
    last: int,
) -> torch.Tensor:
    """Logits [B, last, vocabulary] of the last tokens of teacher-forced inputs, of which those behind the images read
    as each layer's reading says. At tokens of images and at padding the logits mean nothing."""
    device, read = model.device, around[0].visible.shape[1]
    inputs = inputs.to(device)
    ids = inputs["input_ids"]
    behind: dict[str, Any] = {"input_ids": ids[:, -read:], "attention_mask": inputs["attention_mask"]}
    # Elsewhere positions are counted, as in the forward of the harvest.
    if KVGeometry.from_config(model.config).rotary.startswith("mrope"):
        positions = prompt_positions(model, ids, inputs)
        if positions is not None:
            behind["position_ids"] = positions[..., -read:]
    with attach(model):
        cache = _QuestionCache(model, readings, around, ids.shape[1] - read)
        logits: torch.Tensor = model(**behind, **cache_argument(cache), logits_to_keep=last).logits
    return logits


class _QuestionLayer(CapsuleLayer):
    """Cache layer that seems to hold the tokens before the queries' own, and reads them as a reading says."""

    def __init__(self, index: int, recorder: Recorder, reading: Reading, around: Surroundings, before: int) -> None:
        super().__init__(index, recorder)
        self.reading, self.around, self.before = reading, around, before

    def idle(self) -> ForwardContext:
        """Without the layer itself, so that what it read is let go when the cache is."""
        return super().idle()._replace(layers={})

    @property
    def is_empty(self) -> bool:
        return False

    def get_seq_length(self) -> int:
        return self.before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.before

    def attend(self, query: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        assert self._new_tokens is not None
        (keys, values), self._new_tokens = self._new_tokens, None
        return self.reading.read(query, self.around.with_tokens(keys, values), self.around.visible, scale)


class _QuestionCache(CapsuleCache):
    """Cache whose layers hold the prompts up to the queries' tokens."""

    def __init__(
        self, model: PreTrainedModel, readings: Sequence[Reading], around: Sequence[Surroundings], before: int
    ) -> None:
        recorder = Recorder(1)
        super().__init__(model.config, recorder)
        pairs = enumerate(zip(readings, around, strict=True))
        self.layers = [
            _QuestionLayer(i, recorder, reading, surroundings, before) for i, (reading, surroundings) in pairs
        ]

    def begin_forward(self, input_ids: torch.Tensor | None, attention_mask: Any, inputs: Mapping[str, Any]) -> None:
        """Nothing is recorded."""

    def end_forward(self) -> None:
        """Nothing is stored."""
