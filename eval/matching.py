"""Equal bytes: the retention ratios at which pruning stores as many visual bytes as a capsule.

Pruning keeps whole tokens, so one ratio for all layers hits a byte count to a token in every layer at best: of 10 kept tokens, that is
10 %. The first layers therefore keep the next higher number of tokens, as many of them as it takes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from kvcapsule.geometry import KVGeometry
from kvcapsule.policy import EvenlySpaced
from kvcapsule.prefill import LayerPrefill
from kvcapsule.segment import storage_bytes
from kvcapsule.spans import VisualSpan

TOLERANCE = 0.02
"""Bytes are called equal when they differ by no more than this share of the capsule's."""
_STEPS = 10_000
"""Ratios are multiples of 1 / _STEPS."""


class Layout(NamedTuple):
    """Where the visual tokens of a batch are: all that decides how many bytes pruning stores."""

    spans: list[VisualSpan]
    valid: torch.Tensor
    """[B, N] bool: False at padding."""


def match_ratios(
    target: int, layouts: Sequence[Layout], geometry: KVGeometry, layers: Sequence[int], dtype: torch.dtype
) -> tuple[float, ...]:
    """Retention ratios, one for each layer of the model, at which the layers named by `layers` store about `target` visual bytes in all.

    Within TOLERANCE wherever whole tokens allow it; where they do not, the next that is above, so that a rival never has too little.

    Args:
        target: bytes that a capsule was measured to store for all batches.
        layouts: of all batches.
        geometry: of the model.
        layers: its layers with full attention; the others hold no visual tokens of their own.
        dtype: of keys and values.
    """

    @cache
    def stored(step: int) -> int:
        return sum(layer_bytes(step / _STEPS, layout, geometry, dtype) for layout in layouts)

    low, high = 1, _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stored(middle) * len(layers) <= target else (low, middle)
    totals = [stored(high) * n + stored(low) * (len(layers) - n) for n in range(len(layers) + 1)]
    count = min(range(len(totals)), key=lambda n: abs(totals[n] - target))
    if abs(totals[count] - target) > TOLERANCE * target:
        count = next((n for n, total in enumerate(totals) if total >= target), len(layers))
    ratios = [_middle(low, stored)] * geometry.layers
    for layer in layers[:count]:
        ratios[layer] = _middle(high, stored)
    return tuple(ratios)


def _middle(step: int, stored: Callable[[int], int]) -> float:
    """The ratio in the middle of those that store the same: that of the whole tokens that are really kept."""

    def edge(inside: int, beyond: int) -> int:
        """The last step, towards `beyond`, that stores as much as `inside` does."""
        while abs(beyond - inside) > 1:
            middle = (inside + beyond) // 2
            inside, beyond = (middle, beyond) if stored(middle) == stored(step) else (inside, middle)
        return inside

    return (edge(step, 0) + edge(step, _STEPS + 1)) / 2 / _STEPS


def layer_bytes(ratio: float, layout: Layout, geometry: KVGeometry, dtype: torch.dtype) -> int:
    """Bytes of the storages that pruning at `ratio` makes of one layer's visual tokens, laid out like this.

    The policy itself runs, on keys and values of the right shapes that hold nothing: which tokens it keeps does not change their number.
    """
    batch, tokens = layout.valid.shape
    keys = torch.empty(batch, geometry.kv_heads, tokens, geometry.head_dim, dtype=dtype)
    prefill = LayerPrefill(0, keys, keys, torch.empty_like(keys), layout.spans, layout.valid, 1.0)
    kept = EvenlySpaced(ratio).compress(prefill)
    return storage_bytes(tensor for segment in kept.visual for tensor in segment.entry_tensors())
