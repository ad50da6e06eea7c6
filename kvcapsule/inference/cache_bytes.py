"""Bytes that a cache occupies, measured from storages, and those that the full cache would."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..segments.segment import storage_bytes
from .cache_layer import CapsuleLayer


class CacheBytes(NamedTuple):
    """Bytes of the storages that a cache holds."""

    visual: int
    """Segments of the visual spans."""
    text: int
    """Segments of the prompt's text."""
    tail: int
    """Buffers of the tokens written since, with their unwritten part, and the latest queries where a method asks for
    them."""
    other: int
    """The model's own layers (sliding window, linear attention)."""
    parameters: int
    """Maps of the codecs that the segments read: stored once, whatever the batch."""
    host: int = 0
    """What methods keep in the host's memory, beside the device's."""

    @property
    def total(self) -> int:
        """All that is on the device, but the parameters."""
        return self.visual + self.text + self.tail + self.other


def measured(all_layers: Sequence[Any]) -> CacheBytes:
    """The bytes of a cache's layers; a storage that several hold counts once."""
    layers = [layer for layer in all_layers if isinstance(layer, CapsuleLayer)]
    visual = [s for layer in layers for s in layer.visual]
    text = [s for layer in layers for s in layer.text]
    tails = [
        t for layer in layers if layer.is_initialized for t in (*layer.tail.tensors(), layer.queries) if t is not None
    ]
    tails += [t for layer in layers for t in layer.pending_tensors()]
    others = [
        t
        for layer in all_layers
        if not isinstance(layer, CapsuleLayer)
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor)
    ]
    return CacheBytes(
        visual=storage_bytes(t for s in visual for t in s.entry_tensors()),
        text=storage_bytes(t for s in text for t in s.entry_tensors()),
        tail=storage_bytes(iter(tails)),
        other=storage_bytes(iter(others)),
        parameters=storage_bytes(t for s in (*visual, *text) for t in s.parameter_tensors()),
        host=storage_bytes(t for s in (*visual, *text) for t in s.host_tensors()),
    )


def uncompressed(all_layers: Sequence[Any]) -> int:
    """Bytes of the model's own cache for the tokens that a cache was given: computed for the layers with full
    attention, measured for the others, which are the same in both."""
    layers = [layer for layer in all_layers if isinstance(layer, CapsuleLayer) and layer.is_initialized]
    computed = sum(
        tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * tensor.element_size() * int(layer.get_seq_length())
        for layer in layers
        for tensor in (layer.tail.keys, layer.tail.values)
    )
    return computed + measured(all_layers).other
