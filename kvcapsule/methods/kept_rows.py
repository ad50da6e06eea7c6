"""Kept tokens of a prefill as segments of raw rows, the same for all KV heads or chosen for each."""

from dataclasses import replace

import torch

from ..segments.segment import Segment
from .layer_prefill import LayerPrefill

_SLACK = 1.25
"""Padded rows may hold this many times the tokens that they keep; past it, rows of each length get a segment of their
own."""


def keep(prefill: LayerPrefill, kept: torch.Tensor, slack: float = _SLACK) -> list[Segment]:
    """The tokens that `kept` [B, N] (every head alike) marks, as raw rows; none at all gives no segment.

    Rows that keep fewer than the fullest are padded to its length where that is little, and the padding counts as
    stored bytes: `slack` times the tokens that are kept, at most.
    """
    counts = kept.sum(dim=1)
    rows = counts.nonzero()[:, 0]
    if rows.numel() == 0:
        return []
    if bool(kept.all()):
        return [Segment(prefill.keys.contiguous(), prefill.values.contiguous(), rows, each_row=True)]
    present = counts[rows]
    if int(present.max()) * len(rows) <= slack * int(present.sum()):
        return [_gather(prefill, kept, rows)]
    return [_gather(prefill, kept, rows[present == count]) for count in present.unique()]


def _gather(prefill: LayerPrefill, kept: torch.Tensor, rows: torch.Tensor) -> Segment:
    counts = kept[rows].sum(dim=1)
    longest = int(counts.max())
    order = torch.sort((~kept[rows]).to(torch.int8), dim=1, stable=True).indices[:, :longest]
    mask = None
    if bool((counts < longest).any()):
        mask = torch.arange(longest, device=kept.device) < counts[:, None]
        # The padding repeats a token of the row's own: what is measured over a row (a range, a mean) then sees no
        # stranger.
        order = torch.where(mask, order, order[:, :1])

    def take(x_BHND: torch.Tensor) -> torch.Tensor:
        return x_BHND.transpose(1, 2)[rows[:, None], order].transpose(1, 2).contiguous()

    return Segment(take(prefill.keys), take(prefill.values), rows, mask=mask, each_row=len(rows) == len(kept))


UNEVEN = 1.02
"""As _SLACK, for budgets that differ from head to head or from row to row by a method's design: they are to be what
they say, in bytes."""


def keep_heads(prefill: LayerPrefill, kept: torch.Tensor) -> list[Segment]:
    """The tokens that `kept` [B, H, N] marks for each KV head by itself, as raw rows: what a head does not keep is not
    stored for it.

    Where all heads of every row keep equally many, their rows lie side by side, [E, H, M, D]; otherwise each entry is
    of one head (Segment.head), entries of like length share a segment, and none is padded by more than 2 %.
    """
    counts = kept.sum(dim=2)
    if not bool(counts.any()):
        return []
    if bool((counts == counts[:, :1]).all()):
        # What a head keeps is moved to the front, where all heads then keep the same places.
        order = torch.sort((~kept).to(torch.int8), dim=2, stable=True).indices[..., None]
        moved = [x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (prefill.keys, prefill.values)]
        front = torch.arange(kept.shape[2], device=kept.device) < counts[:, :1]
        return keep(replace(prefill, keys=moved[0], values=moved[1]), front, UNEVEN)
    pairs = counts.flatten().nonzero()[:, 0]
    pairs = pairs[counts.flatten()[pairs].argsort(descending=True, stable=True)]
    segments, lengths = [], counts.flatten()[pairs].tolist()
    begin = 0
    while begin < len(lengths):
        end = begin + sum(lengths[begin] <= n * UNEVEN for n in lengths[begin:])
        segments.append(_gather_heads(prefill, kept, pairs[begin:end].sort().values))
        begin = end
    return segments


def _gather_heads(prefill: LayerPrefill, kept: torch.Tensor, pairs: torch.Tensor) -> Segment:
    heads = kept.shape[1]
    chosen = kept.flatten(0, 1)[pairs]
    counts = chosen.sum(dim=1)
    longest = int(counts.max())
    order = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :longest]
    mask = None
    if bool((counts < longest).any()):
        mask = torch.arange(longest, device=kept.device) < counts[:, None]
        order = torch.where(mask, order, order[:, :1])
    keys, values = (
        x.flatten(0, 1)[pairs[:, None], order][:, None].contiguous() for x in (prefill.keys, prefill.values)
    )
    return Segment(keys, values, pairs // heads, mask=mask, head=pairs % heads)
