"""Segments of raw rows, their keys and values packed into few bits."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..segments.packed_rows import Packed
from ..segments.segment import Segment

Pack = Callable[[torch.Tensor], Packed]
"""Makes packed rows of raw rows [E, H, M, D]."""


def packed(segments: Sequence[Segment], keys: Pack, values: Pack) -> list[Segment]:
    """Pack the rows of segments.

    Args:
        segments: of raw rows.
        keys: packs the keys.
        values: packs the values.
    """
    return [_packed(segment, keys, values) for segment in segments]


def _packed(segment: Segment, keys: Pack, values: Pack) -> Segment:
    assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
    return replace(segment, keys=keys(segment.keys), values=values(segment.values))
