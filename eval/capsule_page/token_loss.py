"""What a capsule loses of each visual token, layer by layer: the relative error of the keys and values that attention
reads."""

from typing import NamedTuple

import torch
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.methods.tiles import TileRun, cut_tiles, tile_runs
from kvcapsule.vlm.spans import find_spans


class TokenLoss(NamedTuple):
    """Of the first image of a prompt."""

    keys: torch.Tensor
    """[layers, N]: squared error of each token's keys over all KV heads, divided by the layer's mean variance of a
    token; 0 for tokens that are stored raw."""
    values: torch.Tensor
    """[layers, N]: the same of the values."""
    layers: list[int]
    """Their numbers in the model."""
    grid: tuple[int, int]
    """Rows and columns of the image's tokens; (1, N) where they are no rectangle."""


class _Exact(Method):
    """Records the tiles of each layer and stores nothing."""

    def __init__(self, capsule: Capsule) -> None:
        self.codec = capsule.config.codec
        self.tiles: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.runs: list[TileRun] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        align = self.codec.align
        tiles = cut_tiles(prefill, self.codec.tile, frames=False, align=align)
        if tiles is not None:
            self.runs = list(tile_runs(prefill, self.codec.tile, align))
            self.tiles.append((tiles.keys.float().cpu(), tiles.values.float().cpu()))
        return Compressed([], [])


@torch.no_grad()
def token_loss(model: PreTrainedModel, capsule: Capsule, inputs: BatchFeature) -> TokenLoss | None:
    """Loss of the tokens of a prompt's first image.

    Args:
        model: a VLM that nothing is attached to.
        capsule: on the model's device.
        inputs: of one prompt.

    Returns:
        None where no image fills a tile: all is stored raw.
    """
    exact = _Exact(capsule)
    caches = [CapsuleCache(model.config, method) for method in (exact, capsule)]
    for method, cache in zip((None, capsule), caches, strict=True):
        with attach(model) if method is None else attach(model, method):
            model(**inputs.to(model.device), **cache_argument(cache), logits_to_keep=1)
    if not exact.tiles:
        return None
    span = find_spans(model.config, inputs["input_ids"], inputs)[0]
    first = next((run for run in exact.runs if span.start <= run.start < span.start + span.length), None)
    if first is None or exact.runs.index(first) != 0:
        return None
    layers = {i: layer for i, layer in enumerate(caches[1].layers) if isinstance(layer, CapsuleLayer)}
    losses = torch.zeros(2, len(exact.tiles), span.length)
    covered = slice(first.start - span.start, first.start - span.start + first.tiles * capsule.config.codec.tile)
    for place, (layer, true_tiles) in enumerate(zip(layers.values(), exact.tiles, strict=True)):
        for part, (true, read) in enumerate(zip(true_tiles, layer.visual[0].materialize(), strict=True)):
            losses[part, place, covered] = _relative(true[: first.tiles], read[: first.tiles].cpu())
    t, rows, columns = span.grid
    grid = (t * rows, columns) if t * rows * columns == span.length else (1, span.length)
    return TokenLoss(losses[0], losses[1], list(layers), grid)


def _relative(true_EHTD: torch.Tensor, read_EHTD: torch.Tensor) -> torch.Tensor:
    """[E * T]."""
    true, read = (x.transpose(1, 2).flatten(2).flatten(0, 1) for x in (true_EHTD, read_EHTD))
    error: torch.Tensor = (true - read).square().sum(1) / (true - true.mean(0)).square().sum(1).mean()
    return error
