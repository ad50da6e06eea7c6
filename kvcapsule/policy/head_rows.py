"""Raw rows of several segments side by side again, for methods that choose among what they stored before.

Shapes: B batch rows, H KV heads, M rows of the fullest head, D head dim, P pairs of an entry and one of its heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..methods.kept_rows import keep_heads
from ..methods.layer_prefill import LayerPrefill
from ..segments.segment import Segment


@dataclass(frozen=True)
class HeadRows:
    """What every KV head holds, the oldest first; those of all heads end together."""

    keys: torch.Tensor
    """[B, H, M, D]."""
    values: torch.Tensor
    """As keys."""
    valid: torch.Tensor
    """[B, H, M] bool: False, at the front, where a head holds fewer."""
    visual: torch.Tensor
    """[B, H, M] bool: True at visual tokens."""

    def store(self, kept: torch.Tensor) -> list[Segment]:
        """The rows that `kept` [B, H, M] marks, as segments of their own (see keep_heads)."""
        return keep_heads(
            LayerPrefill(0, self.keys[:, :, :0], self.keys, self.values, [], self.valid.any(dim=1), 1.0), kept
        )


def side_by_side(visual: Sequence[Segment], text: Sequence[Segment], batch: int, heads: int) -> HeadRows:
    """The rows of all segments, those of the first visual one the oldest, those of the last text one the newest.

    Raises:
        ValueError: for segments that hold no raw rows (latents, few bits): they cannot be ranked and dropped one by
        one.
    """
    segments = [*visual, *text]
    if not all(map(_is_raw, segments)):
        raise ValueError(
            "only raw keys and values can be ranked, and these are stored as something else: leave them to another"
            " method."
        )
    filled = torch.zeros(batch * heads, dtype=torch.int64, device=segments[0].owner.device)
    placed = []
    for number, segment in enumerate(segments):
        flat = _flat(segment, heads)
        placed.append((flat, filled[flat.slot], number < len(visual)))
        filled[flat.slot] += segment.tokens
    shape = (batch * heads, int(filled.max()))
    keys, values = (x.new_zeros(*shape, x.shape[2]) for x in (placed[0][0].keys, placed[0][0].values))
    valid = torch.zeros(shape, dtype=torch.bool, device=filled.device)
    seen = torch.zeros_like(valid)
    for flat, begin, is_visual in placed:
        place = (flat.slot[:, None], begin[:, None] + torch.arange(flat.keys.shape[1], device=begin.device))
        # What lies where no token is may be anything, also no number at all.
        keys[place] = flat.keys.masked_fill(~flat.there[..., None], 0.0)
        values[place] = flat.values.masked_fill(~flat.there[..., None], 0.0)
        valid[place], seen[place] = flat.there, is_visual
    # Absent ones to the front, the others in their order; columns without any token are left out.
    longest = int(valid.sum(dim=1).max())
    order = valid.to(torch.int8).sort(dim=1, stable=True).indices[:, shape[1] - longest :]
    rows = (x.gather(1, order[..., None].expand(-1, -1, x.shape[2])) for x in (keys, values))
    flags = (x.gather(1, order) for x in (valid, seen))
    return HeadRows(*(x.unflatten(0, (batch, heads)) for x in (*rows, *flags)))


@dataclass(frozen=True)
class _Flat:
    """A segment, head by head."""

    slot: torch.Tensor
    """[P]: the row and KV head, counted through."""
    keys: torch.Tensor
    """[P, M, D]."""
    values: torch.Tensor
    """As keys."""
    there: torch.Tensor
    """[P, M] bool."""


def _flat(segment: Segment, heads: int) -> _Flat:
    assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
    entries, each = segment.keys.shape[:2]
    head = torch.arange(heads, device=segment.owner.device) if segment.head is None else segment.head[:, None]
    there = segment.mask
    if there is None:
        there = torch.ones(entries, segment.tokens, dtype=torch.bool, device=segment.owner.device)
    slot = (segment.owner[:, None] * heads + head).flatten()
    return _Flat(slot, segment.keys.flatten(0, 1), segment.values.flatten(0, 1), there.repeat_interleave(each, dim=0))


def _is_raw(segment: Segment) -> bool:
    extras = ("score_map", "value_map", "value_mean", "q_map", "out_map", "bias", "frame")
    as_tensors = isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
    return as_tensors and all(getattr(segment, name) is None for name in extras)
