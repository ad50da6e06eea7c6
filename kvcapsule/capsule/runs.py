"""How a capsule goes through a prefill: its tiles in their canonical frames, and stacks of layers whose tiles have one
codec."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..codec import CodecConfig, LayerGroupCodec, LayerGroupEncoding
from ..methods.kept_rows import keep
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.tiles import Tiles, cut_tiles, tiled
from ..segments.rotary_frame import Frame
from ..vlm.geometry import KVGeometry


def canonical_tiles(
    prefill: LayerPrefill, config: CodecConfig, geometry: KVGeometry
) -> tuple[Tiles | None, Compressed]:
    """A layer's visual tiles, and what is in none of them, raw. None: nothing fills a tile.

    Keys are as if each tile began at position 0, where the config says so.

    Raises:
        RuntimeError: if the model rotates its keys and the rotation is not known.
    """
    tiles = cut_tiles(prefill, config.tile, config.canonical_frame, turned=True, lent=True)
    visual = prefill.visual()
    text = keep(prefill, prefill.valid & ~visual)
    if tiles is None:
        return None, Compressed(keep(prefill, visual), text)
    if config.canonical_frame and tiles.frame is None and geometry.rotary != "none":
        raise RuntimeError(
            "no rotation of the prompt's positions reached the capsule: run the model inside `with"
            " kvcapsule.attach(model, ...):`."
        )
    return tiles, Compressed(keep(prefill, visual & ~tiled(prefill, config.tile)), text)


class _Waiting(NamedTuple):
    """What is held of a layer until its stack is done."""

    layer: int
    owner: torch.Tensor
    frame: Frame | None
    raw: Compressed


class LayerGroupPass:
    """One forward's compression by codecs of stacks: a stack is done when its last layer is added.

    Until then what its codec makes of each layer waits, and what is in no tile; a layer's keys and values are not held.
    """

    def __init__(
        self, codecs: Sequence[LayerGroupCodec], config: CodecConfig, geometry: KVGeometry, layers: Sequence[int]
    ) -> None:
        """layers: all that will be added, by their index in the model and in their order."""
        self.codecs, self.config, self.geometry = codecs, config, geometry
        # A model's layers with a window are not among them, so that the last of a stack may be missing.
        self.last = {layer // config.layer_group: layer for layer in layers}
        self.encoding: LayerGroupEncoding | None = None
        self.waiting: list[_Waiting] = []

    @torch.no_grad()
    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        stack, place = divmod(prefill.layer, self.config.layer_group)
        tiles, raw = canonical_tiles(prefill, self.config, self.geometry)
        if tiles is None:
            return [(prefill.layer, raw)]
        self.encoding = self.encoding or self.codecs[stack].start()
        self.encoding.add(place, tiles.keys, tiles.values)
        self.waiting.append(_Waiting(prefill.layer, tiles.owner, tiles.frame, raw))
        if prefill.layer != self.last[stack]:
            return []
        all_encoded = self.encoding.finish([of.layer % self.config.layer_group for of in self.waiting])
        done = [
            (of.layer, Compressed([encoded.segment(of.owner, of.frame), *of.raw.visual], of.raw.text))
            for of, encoded in zip(self.waiting, all_encoded, strict=True)
        ]
        self.encoding, self.waiting = None, []
        return done
