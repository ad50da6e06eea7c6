"""Raw rows that are stored in few bits once they have left a window of recent tokens, and the joining of such rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..segments.group_quantized_rows import GroupedRows
from ..segments.segment import Segment


@dataclass(frozen=True)
class Exact(Segment):
    """Raw rows that know what becomes of them."""

    later: int | None = None
    """Bits of a code once they have left the window; None: they stay raw."""


def exact(raw: Segment, later: int | None) -> Exact:
    return Exact(raw.keys, raw.values, raw.owner, mask=raw.mask, later=later)


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


def joined(coded: Sequence[Segment]) -> list[Segment]:
    """Segments of GroupedRows with like owners and bits as one: attention's time grows with the number of segments."""
    alike: dict[tuple[int, ...], list[Segment]] = {}
    for s in coded:
        assert isinstance(s.keys, GroupedRows)
        alike.setdefault((s.keys.bits, *s.owner.tolist()), []).append(s)
    return [_join(parts) for parts in alike.values()]


def _join(parts: list[Segment]) -> Segment:
    if len(parts) == 1:
        return parts[0]
    keys, values = [], []
    for s in parts:
        assert isinstance(s.keys, GroupedRows) and isinstance(s.values, GroupedRows)
        keys.append(s.keys)
        values.append(s.values)
    mask = None
    if any(s.mask is not None for s in parts):
        there = [
            torch.ones(len(s.owner), s.tokens, dtype=torch.bool, device=s.owner.device) if s.mask is None else s.mask
            for s in parts
        ]
        mask = torch.cat(there, dim=1)
    return replace(parts[0], keys=GroupedRows.join(keys), values=GroupedRows.join(values), mask=mask)
