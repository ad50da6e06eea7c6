"""Rows that leave a window of recent tokens: parts of raw segments, and coded segments merged into one."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..segments.group_quantized_rows import GroupedRows
from ..segments.segment import Segment


def entries(raw: Segment, index: torch.Tensor) -> Segment:
    """Copies of the entries `index` of raw rows."""
    assert isinstance(raw.keys, torch.Tensor) and isinstance(raw.values, torch.Tensor)
    mask = None if raw.mask is None else raw.mask[index]
    return Segment(
        raw.keys[index], raw.values[index], raw.owner[index], mask=None if mask is None or bool(mask.all()) else mask
    )


def cut(raw: Segment, begin: int, end: int) -> Segment:
    """The tokens from `begin` to `end` of raw rows; views."""
    assert isinstance(raw.keys, torch.Tensor) and isinstance(raw.values, torch.Tensor)
    mask = None if raw.mask is None else raw.mask[:, begin:end]
    return Segment(raw.keys[:, :, begin:end], raw.values[:, :, begin:end], raw.owner, mask=mask)


def merge_coded(coded: Sequence[Segment]) -> list[Segment]:
    """Segments of GroupedRows with like owners and bits as one: attention's time grows with the number of segments."""
    alike: dict[tuple[int, ...], list[Segment]] = {}
    for s in coded:
        assert isinstance(s.keys, GroupedRows)
        alike.setdefault((s.keys.bits, *s.owner.tolist()), []).append(s)
    return [_merge(parts) for parts in alike.values()]


def _merge(parts: list[Segment]) -> Segment:
    if len(parts) == 1:
        return parts[0]
    keys, values = [], []
    for s in parts:
        assert isinstance(s.keys, GroupedRows) and isinstance(s.values, GroupedRows)
        keys.append(s.keys)
        values.append(s.values)
    mask = None
    if any(s.mask is not None for s in parts):
        masks = [
            torch.ones(len(s.owner), s.tokens, dtype=torch.bool, device=s.owner.device) if s.mask is None else s.mask
            for s in parts
        ]
        mask = torch.cat(masks, dim=1)
    return replace(parts[0], keys=GroupedRows.join(keys), values=GroupedRows.join(values), mask=mask)
