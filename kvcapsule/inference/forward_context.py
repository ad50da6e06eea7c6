"""What one forward brings to the layers of a CapsuleCache."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, CompressionPass
from ..vlm.spans import VisualSpan
from .autocast import without_autocast


class SegmentStore(Protocol):
    """A layer that stores compressed prefills."""

    def add_segments(self, compressed: Compressed) -> None:
        """Append what the method made of a prefill."""


class ForwardContext(NamedTuple):
    """Set by the hook on the model before its layers run; the same for all layers."""

    spans: list[VisualSpan]
    """Visual spans among the forward's tokens."""
    valid: torch.Tensor | None
    """[B, N] bool: False at padding; None: no padding."""
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    """The rotary cos and sin of the forward's positions, each [B or 1, N, R]."""
    shared: dict[Hashable, Any]
    """What the layers have in common (LayerPrefill.shared)."""
    compression: CompressionPass
    """Compresses the layers' prefills."""
    layers: Mapping[int, SegmentStore]
    """Where compressed prefills go, by the layer's index in the model."""
    before: Sequence[int] | None = None
    """[B]: tokens of each row before the forward's (LayerPrefill.before)."""

    def compress(self, prefill: LayerPrefill) -> None:
        """Compress a layer's prefill, and store what the method gives back: of this layer, none, or several."""
        with without_autocast(prefill.keys.device):
            for index, compressed in self.compression.add(prefill):
                self.layers[index].add_segments(compressed)
