"""Kept tokens of a prefill as segments of raw rows, the same for all KV heads or chosen for each."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..segments.segment import Segment
from .layer_prefill import LayerPrefill

MAX_PADDING = 1.25
"""Padded rows may hold this many times the tokens that they keep; past it, rows of each length get a segment of their
own."""


class Places(NamedTuple):
    """Where the tokens of one segment lie in a prefill: those of E rows, M of each at most."""

    rows: torch.Tensor
    """[E] int64."""
    order: torch.Tensor | None
    """[E, M] int64: positions of the tokens; None: all tokens of all rows."""
    mask: torch.Tensor | None
    """[E, M] bool: False where a row keeps fewer than M; None where none does."""
    each_row: bool
    """Whether the rows are those of the batch."""


def gather_kept(
    prefill: LayerPrefill, kept: torch.Tensor, max_padding: float = MAX_PADDING, alike: str | None = None
) -> list[Segment]:
    """The tokens that `kept` [B, N] (every head alike) marks, as raw rows; none at all gives no segment.

    Rows that keep fewer than the fullest are padded to its length where that is little, and the padding counts as
    stored bytes: `max_padding` times the tokens that are kept, at most. The host waits for an accelerator once.

    Args:
        prefill: of the layer.
        kept: the tokens.
        max_padding: see above.
        alike: a name for the tokens if all layers of the forward keep these: their places are then found in the first
            layer, and the others do not wait.
    """
    key = ("places of kept tokens", alike, max_padding, kept.shape[1], kept.device)
    places: list[Places] | None = None if alike is None else prefill.shared.get(key)
    if places is None:
        places = places_of(kept, kept.sum(dim=1).tolist(), max_padding)
        if alike is not None:
            prefill.shared[key] = places
    return [_gather(prefill, of_segment) for of_segment in places]


def gather_apart(
    prefill: LayerPrefill, masks: Sequence[torch.Tensor], max_padding: float = MAX_PADDING
) -> list[list[Segment]]:
    """`gather_kept` of each mask; the host waits once for all of them."""
    counts: list[list[int]] = torch.stack([kept.sum(dim=1) for kept in masks]).tolist()
    return [
        [_gather(prefill, places) for places in places_of(kept, of_mask, max_padding)]
        for kept, of_mask in zip(masks, counts, strict=True)
    ]


def places_of(kept: torch.Tensor, counts: list[int], max_padding: float = MAX_PADDING) -> list[Places]:
    """The places of the tokens that `kept` [B, N] marks, segment by segment (see gather_kept); counts: of each row."""
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return []
    if all(count == kept.shape[1] for count in counts):
        return [Places(torch.arange(len(rows), device=kept.device), None, None, True)]
    if max(counts) * len(rows) <= max_padding * sum(counts):
        return [_places(kept, rows, counts)]
    lengths = sorted({counts[row] for row in rows})
    return [_places(kept, [row for row in rows if counts[row] == length], counts) for length in lengths]


def _places(kept: torch.Tensor, rows: list[int], counts: list[int]) -> Places:
    index = indices(rows, kept.device)
    chosen = kept if len(rows) == len(kept) else kept[index]
    order, mask = _order(chosen, [counts[row] for row in rows])
    return Places(index, order, mask, len(rows) == len(kept))


def _order(chosen: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices [R, M] of the tokens that `chosen` [R, N] marks, M those of the longest row, and which of them are no
    padding, [R, M] bool; None: all. counts: of each row.

    The padding repeats a token of the row's own: what is measured over a row (a range, a mean) then sees no stranger.
    """
    longest = max(counts)
    order = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :longest]
    if min(counts) == longest:
        return order, None
    mask = torch.arange(longest, device=chosen.device) < chosen.sum(dim=1)[:, None]
    return torch.where(mask, order, order[:, :1]), mask


def indices(values: list[int], device: torch.device) -> torch.Tensor:
    """[n] int64 on a device, for which the host does not wait."""
    if values and values == list(range(values[0], values[0] + len(values))):
        return torch.arange(values[0], values[0] + len(values), device=device)
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _gather(prefill: LayerPrefill, places: Places) -> Segment:
    order, mask = places.order, places.mask
    # Each layer's own, so that layers count and move their bytes by themselves.
    rows = places.rows.clone()
    if order is None:
        return Segment(prefill.keys.contiguous(), prefill.values.contiguous(), rows, each_row=places.each_row)
    index = rows[:, None], order

    def take(x_BHND: torch.Tensor) -> torch.Tensor:
        return x_BHND.transpose(1, 2)[index].transpose(1, 2).contiguous()

    own_mask = None if mask is None else mask.clone()
    return Segment(take(prefill.keys), take(prefill.values), rows, mask=own_mask, each_row=places.each_row)


PER_HEAD_PADDING = 1.02
"""As MAX_PADDING, for budgets that differ from head to head or from row to row by a method's design, so that they hold
in bytes."""


def gather_kept_per_head(
    prefill: LayerPrefill, kept: torch.Tensor, counts: list[list[int]] | None = None
) -> list[Segment]:
    """The tokens that `kept` [B, H, N] marks for each KV head by itself, as raw rows: what a head does not keep is not
    stored for it.

    Where all heads of every row keep equally many, their rows lie side by side, [E, H, M, D]; otherwise each entry is
    of one head (Segment.head), entries of like length share a segment, and none is padded by more than 2 %.

    counts: tokens of each head of each row, where the host knows them; else it waits for an accelerator once.
    """
    if counts is None:
        counts = kept.sum(dim=2).tolist()
    if not any(map(any, counts)):
        return []
    if all(count == of_row[0] for of_row in counts for count in of_row):
        # What a head keeps is moved to the front, where all heads then keep the same places.
        order = torch.sort((~kept).to(torch.int8), dim=2, stable=True).indices[..., None]
        moved = [x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (prefill.keys, prefill.values)]
        front = torch.arange(kept.shape[2], device=kept.device) < kept.sum(dim=2)[:, :1]
        front_of = replace(prefill, keys=moved[0], values=moved[1])
        places = places_of(front, [of_row[0] for of_row in counts], PER_HEAD_PADDING)
        return [_gather(front_of, of_segment) for of_segment in places]
    flat = [count for of_row in counts for count in of_row]
    # Stable: heads of like length keep their order.
    pairs = sorted((pair for pair, count in enumerate(flat) if count), key=lambda pair: -flat[pair])
    segments, begin = [], 0
    while begin < len(pairs):
        end = begin + sum(flat[pairs[begin]] <= flat[pair] * PER_HEAD_PADDING for pair in pairs[begin:])
        segments.append(_gather_heads(prefill, kept, sorted(pairs[begin:end]), flat))
        begin = end
    return segments


def _gather_heads(prefill: LayerPrefill, kept: torch.Tensor, pairs: list[int], counts: list[int]) -> Segment:
    heads, index = kept.shape[1], indices(pairs, kept.device)
    chosen = kept.flatten(0, 1)[index]
    order, mask = _order(chosen, [counts[pair] for pair in pairs])
    keys, values = (
        x.flatten(0, 1)[index[:, None], order][:, None].contiguous() for x in (prefill.keys, prefill.values)
    )
    return Segment(keys, values, index // heads, mask=mask, head=index % heads)
