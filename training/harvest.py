"""Harvest: keys and values of a frozen VLM's visual tokens, and the queries that attend to them.

The VLM runs one ordinary forward over question and answer (teacher-forced). A method that records instead of
compressing sees the same layer prefills as a capsule at inference.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.errors import DataError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.methods.tiles import cut_tiles, tiled
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment


class Alignment(NamedTuple):
    """Where the tiles of a batch begin (kvcapsule.methods.tiles.tile_starts)."""

    align: int = 1
    """At multiples of so many tokens; 1: at a visual span's first token."""
    before: tuple[int, ...] | None = None
    """[B]: tokens that are counted before each row's own, though there are none. A served prompt has any text before
    its image, so tiles begin at any phase of the image; positions of the keys are not changed."""


AT_SPANS = Alignment()


@dataclass(frozen=True)
class LayerHarvest:
    """One layer's visual tiles and the queries that attend to them. E tiles of T tokens, B rows, Q queries, R other
    tokens."""

    keys: torch.Tensor
    """[E, H, T, D], in the tiles' canonical frames if `frame` is given."""
    values: torch.Tensor
    """[E, H, T, D]."""
    owner: torch.Tensor
    """[E] batch row of each tile."""
    frame: Frame | None
    query: torch.Tensor
    """[B, H * G, Q, D]: queries of the tokens after the last image (prompt and answer)."""
    reads: torch.Tensor
    """[B, Q] bool: False at padding of `query`."""
    rest: Segment
    """All other tokens, raw: text, and visual tokens that are in no tile."""
    visible: torch.Tensor
    """[B, Q, R]: which tokens of `rest` each query sees."""
    scale: float
    place: torch.Tensor | None = None
    """[B, R] int64: the number among `query` of each token of `rest`; -1 for tokens in front of a row's queries that
    read. None: not recorded."""


class Recorder(Method):
    """Method that records layer prefills instead of compressing them."""

    def __init__(self, tile: int, canonical: bool = True, alignment: Alignment = AT_SPANS) -> None:
        self.tile, self.canonical, self.alignment = tile, canonical, alignment
        self.layers: list[LayerHarvest] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        align = self.alignment.align
        if self.alignment.before is not None:
            prefill = replace(prefill, before=self.alignment.before)
        tiles = cut_tiles(prefill, self.tile, frames=self.canonical, derotated=True, align=align)
        if tiles is None:
            longest = (
                f"{self.tile} visual tokens or more" if align == 1 else f"{self.tile} visual tokens in whole blocks"
            )
            raise DataError(
                f"a batch has no image of {longest}, so nothing fills a tile: choose a smaller"
                " --codec.tile, or data whose prompts hold images of the size that the capsule is for."
            )
        ends = [
            max((s.start + s.length for s in prefill.spans if s.row == row), default=0)
            for row in range(prefill.valid.shape[0])
        ]
        first = min(ends)
        positions = torch.arange(prefill.valid.shape[1], device=prefill.valid.device)
        reads = prefill.valid[:, first:] & (positions[first:] >= torch.tensor(ends, device=positions.device)[:, None])
        rest, order = _rest(prefill, prefill.valid & ~tiled(prefill, self.tile, align))
        visible = order[:, None, :] <= positions[first:, None]
        place = (order - first).where(order >= torch.tensor(ends, device=order.device)[:, None], -1)
        self.layers.append(
            LayerHarvest(
                tiles.keys,
                tiles.values,
                tiles.owner,
                tiles.frame,
                prefill.query[:, :, first:].clone(),
                reads,
                rest,
                visible,
                prefill.scale,
                place,
            )
        )
        return Compressed([], [])


def _rest(prefill: LayerPrefill, kept: torch.Tensor) -> tuple[Segment, torch.Tensor]:
    """The tokens marked in `kept` as one padded segment, and their positions [B, R]."""
    counts = kept.sum(dim=1)
    order = torch.sort((~kept).to(torch.int8), dim=1, stable=True).indices[:, : int(counts.max())]
    rows = torch.arange(kept.shape[0], device=kept.device)
    keys = prefill.keys.transpose(1, 2)[rows[:, None], order].transpose(1, 2)
    values = prefill.values.transpose(1, 2)[rows[:, None], order].transpose(1, 2)
    mask = torch.arange(order.shape[1], device=kept.device) < counts[:, None]
    return Segment(keys, values, rows, mask=mask), order


def harvest(
    model: PreTrainedModel, inputs: BatchFeature, tile: int, canonical: bool = True, alignment: Alignment = AT_SPANS
) -> list[LayerHarvest]:
    """Run the frozen model over a batch and record every layer."""
    return harvest_with_logits(model, inputs, tile, canonical, 1, alignment)[0]


@torch.no_grad()
def harvest_with_logits(
    model: PreTrainedModel,
    inputs: BatchFeature,
    tile: int,
    canonical: bool,
    last: int,
    alignment: Alignment = AT_SPANS,
) -> tuple[list[LayerHarvest], torch.Tensor]:
    """Record every layer of a forward over a batch, and return the logits [B, last, vocabulary] of the last tokens
    too."""
    recorder = Recorder(tile, canonical, alignment)
    with attach(model):
        cache = CapsuleCache(model.config, recorder)
        out = model(**inputs.to(model.device), **cache_argument(cache), logits_to_keep=last)
    # A cache refers to itself, and lives until such cycles are looked for: what it recorded does not.
    layers, recorder.layers = recorder.layers, []
    return layers, out.logits
