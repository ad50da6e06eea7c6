"""CapsulePool: the tiles of all requests in slots of fixed size, layer by layer, as segments that attention reads.

How many slots there are is decided in kvcapsule.serving.budget (`divide`) or set (kvcapsule.serving.settings).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from ..capsule.capsule import Capsule
from ..methods.layer_prefill import LayerPrefill
from ..segments.memo import Memo
from ..segments.segment import Segment, storage_bytes
from ..vlm.spans import VisualSpan

Rotation = tuple[torch.Tensor, torch.Tensor]


def compress_tiles(
    capsule: Capsule,
    layers: Sequence[int],
    tiles: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    rotation: Rotation | None,
) -> dict[int, Segment]:
    """The segment of each layer that holds B images of N tokens each, N a multiple of the capsule's tile.

    Args:
        capsule: whose codecs are used.
        layers: their indices in the model, in their order.
        tiles: gives a layer's keys and values [B, H, N, D] when it is due, so that those of one are held at a time.
        rotation: the model's cos and sin [B or 1, N, R] at these tokens; None for models without RoPE.
    """
    segments: dict[int, Segment] = {}
    run = capsule.begin_pass(layers)
    shared: dict[Hashable, Any] = {}
    for layer in layers:
        keys, values = tiles(layer)
        batch, _, count, dim = keys.shape
        prefill = LayerPrefill(
            layer=layer,
            query=keys.new_zeros(batch, capsule.config.geometry.query_heads, 0, dim),
            keys=keys,
            values=values,
            spans=[VisualSpan(row, 0, count, (1, 1, count)) for row in range(batch)],
            valid=torch.ones(batch, count, dtype=torch.bool, device=keys.device),
            scale=dim**-0.5,
            position_embeddings=rotation,
            shared=shared,
        )
        for index, compressed in run.add(prefill):
            (segments[index],) = compressed.visual
    return segments


def one_tile(
    capsule: Capsule, layers: Sequence[int], dtype: torch.dtype, rotation: Rotation | None
) -> dict[int, Segment]:
    """A tile of zeros, compressed: it shows the form and the size of what a slot holds.

    Args:
        capsule: whose codecs are used.
        layers: their indices in the model.
        dtype: of the engine's keys and values.
        rotation: cos and sin [1, T, R] of any T positions.
    """
    geometry, tile = capsule.config.geometry, capsule.config.codec.tile
    zeros = torch.zeros(1, geometry.kv_heads, tile, geometry.head_dim, dtype=dtype)
    return compress_tiles(capsule, layers, lambda _: (zeros, zeros), rotation)


def slot_bytes(tile: Mapping[int, Segment]) -> int:
    """Bytes of a slot in all layers."""
    return storage_bytes(t for segment in tile.values() for t in _tensors(segment))


class CapsulePool:
    """Slots for compressed tiles: one segment for each layer, whose entries are the slots."""

    def __init__(self, tile: Mapping[int, Segment], slots: int) -> None:
        """tile: as `one_tile` gives it; its contents do not matter."""
        # Layers of a layer group share rows, and all layers share frames: so do their pools.
        memo, rows = Memo(), torch.zeros(slots, dtype=torch.int64)
        self.layers = {layer: segment.select(rows, memo) for layer, segment in tile.items()}

    def put(self, slots: Sequence[int], segments: Mapping[int, Segment]) -> None:
        """Write the entries of a segment of each layer into these slots."""
        index = torch.tensor(slots)
        written: set[int] = set()
        for layer, segment in segments.items():
            for pool, rows in zip(_tensors(self.layers[layer]), _tensors(segment), strict=True):
                if pool.data_ptr() not in written:
                    written.add(pool.data_ptr())
                    pool.index_copy_(0, index, rows)

    @property
    def bytes(self) -> int:
        return storage_bytes(t for segment in self.layers.values() for t in _tensors(segment))


def _tensors(segment: Segment) -> list[torch.Tensor]:
    """What is stored of the entries, without their owner."""
    return [t for t in segment.entry_tensors() if t is not segment.owner]
