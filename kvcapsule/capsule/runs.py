"""Compression passes of a capsule: tiles in canonical frames, and layer groups that are coded at their last layer."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from ..codec import CodecConfig, Encoded, LayerGroupCodec, LayerGroupEncoding
from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.tiles import Tiles, cut_tiles, tiled
from ..segments.rotary_frame import Frame
from ..vlm.geometry import KVGeometry


def canonical_tiles(
    prefill: LayerPrefill, config: CodecConfig, geometry: KVGeometry, borrowed: bool = False
) -> tuple[Tiles | None, Compressed]:
    """A layer's visual tiles, and what is in none of them, raw. None: nothing fills a tile.

    Keys are as if each tile began at position 0, where the config says so.

    Args:
        prefill: of the layer.
        config: of the codec.
        geometry: of the model.
        borrowed: whether the tiles may be overwritten by the next layer's (see cut_tiles).

    Raises:
        RuntimeError: if the model rotates its keys and the rotation is not known.
    """
    tiles = cut_tiles(
        prefill, config.tile, config.canonical_frame, derotated=True, borrowed=borrowed, align=config.align
    )
    visual = prefill.visual()
    text = gather_kept(prefill, prefill.valid & ~visual, alike="text")
    if tiles is None:
        return None, Compressed(gather_kept(prefill, visual, alike="visual"), text)
    if config.canonical_frame and tiles.frame is None and geometry.rotary != "none":
        raise RuntimeError(
            "no rotation of the prompt's positions reached the capsule: run the model inside `with"
            " kvcapsule.attach(model, ...):`."
        )
    untiled = visual & ~tiled(prefill, config.tile, config.align)
    return tiles, Compressed(gather_kept(prefill, untiled, alike=f"untiled {config.tile} {config.align}"), text)


def require_copies(codec: nn.Module, encoded: Iterable[Encoded], tiles: Tiles) -> None:
    """Raises RuntimeError if anything that a codec encoded is a view of the tiles that it borrowed."""
    borrowed = {tiles.keys.untyped_storage().data_ptr(), tiles.values.untyped_storage().data_ptr()}
    if any(tensor.untyped_storage().data_ptr() in borrowed for one in encoded for tensor in one.tensors()):
        raise RuntimeError(
            f"{type(codec).__name__} borrows its tiles (borrows_tiles = True) and encoded views of them, which the next"
            " layer overwrites: let it return copies, or leave borrows_tiles False."
        )


def move_beside(codec: nn.Module, keys: torch.Tensor) -> None:
    """Move a codec to where its layer's keys lie, if it lies elsewhere: layers of one model may lie on several
    devices."""
    tensor = next(chain(codec.parameters(), codec.buffers()), keys)
    if tensor.device != keys.device:
        codec.to(keys.device)


class _PendingLayer(NamedTuple):
    """What is held of a layer until its group is done."""

    layer: int
    owner: torch.Tensor
    frame: Frame | None
    raw: Compressed


class LayerGroupPass:
    """One forward's compression by codecs of layer groups: a group is done when its last layer is added.

    Until then what its codec makes of each layer is held, and what is in no tile; a layer's keys and values are not.
    """

    def __init__(
        self, codecs: Sequence[LayerGroupCodec], config: CodecConfig, geometry: KVGeometry, layers: Sequence[int]
    ) -> None:
        """layers: all that will be added, by their index in the model and in their order."""
        self.codecs, self.config, self.geometry = codecs, config, geometry
        # Not all layers need be among them, so that the last of a group may be missing.
        self.last = {self._place(layer)[0]: layer for layer in layers}
        self.encoding: LayerGroupEncoding | None = None
        self.pending: list[_PendingLayer] = []

    def _place(self, layer: int) -> tuple[int, int]:
        """A layer's group, and its number in it."""
        return divmod(self.geometry.place(layer), self.config.layer_group)

    @torch.no_grad()
    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        group, index = self._place(prefill.layer)
        codec = self.codecs[group]
        tiles, raw = canonical_tiles(prefill, self.config, self.geometry, codec.borrows_tiles)
        if tiles is None:
            return [(prefill.layer, raw)]
        if self.encoding is None:
            move_beside(codec, tiles.keys)
            self.encoding = codec.start()
        self.encoding.add(index, tiles.keys, tiles.values)
        self.pending.append(_PendingLayer(prefill.layer, tiles.owner, tiles.frame, raw))
        if prefill.layer != self.last[group]:
            return []
        group_encoded = self.encoding.finish([self._place(of.layer)[1] for of in self.pending])
        if codec.borrows_tiles:
            require_copies(codec, group_encoded, tiles)
        done = [
            (of.layer, Compressed([encoded.segment(of.owner, of.frame), *of.raw.visual], of.raw.text))
            for of, encoded in zip(self.pending, group_encoded, strict=True)
        ]
        self.encoding, self.pending = None, []
        return done
