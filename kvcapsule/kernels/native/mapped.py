"""Mapped segments in one pass (tiles.py): which ones are covered, and what a kernel is given.

Covered are segments of all KV heads with both maps along the tokens and no bias, in fp32: coded keys and values, with maps for the queries
and frames or none. By form alone; all else is the reference's steps.
"""

import numpy as np
import torch

from ...codec.cells import CodedRows, Coding, Runs
from ...segment import Segment
from .. import reference
from .flat import flat
from .forms import Coded, Entries, Form, Map, Sums, Turn
from .jit import U
from .share import Piece, pieces, run
from .tiles import BLOCKS, kernel

_NOTHING = torch.zeros(1)
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Sums of values [B, H, R, D], greatest scores and masses [B, H, R]."""


def covers(segment: Segment) -> bool:
    """Whether a kernel reads the segment."""
    s = segment
    if s.score_map is None or s.value_map is None or s.bias is not None or s.head is not None or not s.tokens or not len(s.owner):
        return False
    if not isinstance(s.keys, CodedRows) or not isinstance(s.values, CodedRows) or s.q_map is None:
        return False
    maps = [t for t in (s.score_map, s.value_map, s.q_map, s.out_map, s.value_mean) if t is not None]
    learned = [*maps, *(t for rows in (s.keys, s.values) for t in (rows.coding.step, rows.coding.offset))]
    if any(t.dtype != torch.float32 or (torch.is_grad_enabled() and t.requires_grad) for t in learned):
        return False
    if s.frame is not None and s.frame.cos.dtype != torch.float32:
        return False
    sets = s.keys.coding.widths.shape[0]
    alike = s.values.coding.widths.shape[0] == sets and {s.score_map.shape[0], s.value_map.shape[0]} <= {1, sets}
    return alike and s.keys.packed.stride(1) == 1 and s.values.packed.stride(1) == 1


def attend(q_BHRD: torch.Tensor, segment: Segment) -> Part:
    """Scaled queries, fp32, with all tokens of a covered segment."""
    keys, values = segment.keys, segment.values
    assert isinstance(keys, CodedRows) and isinstance(values, CodedRows)
    assert segment.q_map is not None and segment.score_map is not None and segment.value_map is not None
    batch, kv_heads, each, dim = q_BHRD.shape
    coding = keys.coding
    sets, heads = len(coding.widths), coding.heads
    form = Form(
        *map(U, (sets, heads, each, dim, segment.tokens, keys.shape[2], values.shape[2], coding.widths.shape[2], values.coding.widths.shape[2]))
    )  # fmt: skip
    entries = _entries(segment)
    given = (
        form, entries, _turn(q_BHRD, segment), _map(segment.score_map), _map(segment.value_map),
        _coded(keys, coding.runs_of_groups), _coded(values, values.coding.runs_of_channels),
    )  # fmt: skip
    run_ = kernel(_block(heads * each), coded=True)
    count = sets * len(entries.order)
    work = count * heads * each * segment.tokens * (keys.shape[2] + values.shape[2])
    shared = pieces(count, 1, work, partable=False)
    rows = heads * each
    found = [
        (
            q_BHRD.new_zeros(batch, sets, rows, int(form.value_channels)),
            q_BHRD.new_zeros(batch, sets, rows, values.shape[2]),
            q_BHRD.new_full((batch, sets, rows), -torch.inf),
            q_BHRD.new_zeros(batch, sets, rows),
        )
        for _ in shared
    ]

    def call(piece: Piece) -> None:
        run_(*given, Sums(*map(flat, found[shared.index(piece)])), U(piece.begin), U(piece.end))

    run(call, shared)
    out, weights, top, mass = _joined(found)
    out = torch.baddbmm(out.flatten(0, 1), weights.flatten(0, 1), values.coding.offset.repeat(batch, 1, 1)).view(out.shape)
    out, top, mass = (x.view(batch, kv_heads, each, *x.shape[3:]) for x in (out, top, mass))
    if segment.value_mean is not None:
        out = out + mass[..., None] * segment.value_mean[:, None]
    return out if segment.out_map is None else reference.mapped(out, segment.out_map), top, mass


def _joined(found: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    if len(found) == 1:
        return found[0]
    outs, weights, tops, masses = (torch.stack(parts) for parts in zip(*found, strict=True))
    top = tops.amax(dim=0)
    factors = (tops - top.clamp_min(torch.finfo(top.dtype).min)).exp()
    return (outs * factors[..., None]).sum(0), (weights * factors[..., None]).sum(0), top, (masses * factors).sum(0)


def _block(rows: int) -> int:
    """The block size that fills up least; the largest of those."""
    return min(BLOCKS, key=lambda size: (-(-rows // size) * size + 2 * -(-rows // size), -size))


def _entries(segment: Segment) -> Entries:
    owner = segment.owner.numpy()
    order = np.argsort(owner, kind="stable")
    mask = segment.mask
    if mask is not None:
        order = order[mask.any(dim=1).numpy()[order]]
    return Entries(order.view(U), owner.view(U), flat((mask if mask is not None else _NOTHING.bool()).contiguous()), mask is not None)


def _turn(q_BHRD: torch.Tensor, segment: Segment) -> Turn:
    frame, q_map = segment.frame, segment.q_map
    assert q_map is not None
    cos, sin = (_NOTHING, _NOTHING) if frame is None else (frame.cos.contiguous(), frame.sin.contiguous())
    half = 0 if frame is None else cos.shape[1]
    return Turn(flat(q_BHRD), flat(cos), flat(sin), U(half), frame is not None and frame.neighbours, flat(q_map.contiguous()))


def _map(map_: torch.Tensor) -> Map:
    sets, token, row = map_.stride()
    return Map(flat(map_), U(sets if len(map_) > 1 else 0), U(token), U(row))


def _coded(rows: CodedRows, runs: Runs) -> Coded:
    coding: Coding = rows.coding
    tables = (flat(table).view(np.uint32) for table in runs)
    return Coded(
        flat(rows.packed), U(rows.packed.stride(0)), *tables,
        *(flat(t.contiguous()) for t in (coding.widths, coding.step, coding.offset)),
    )  # fmt: skip
