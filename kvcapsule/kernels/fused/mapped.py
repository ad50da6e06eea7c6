"""Launching kvcapsule.kernels.fused.maps: the four stages of a mapped segment, and turned queries for any."""

from typing import Any, NamedTuple

import torch

from ...segments.coefficient_rows import CodedRows
from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import Rows, Segment
from .call import Call, Part, Producer
from .device import CODED, LOG2E, QUANTISED, RAW, block, dot_type
from .maps import map_scores, score_rows, turn_queries, weigh_rows
from .plan import index_of

_TILE_ROWS = 64
"""(entry, row) pairs that share a block of a map."""


def turned(call: Call, segment: Segment) -> torch.Tensor:
    """Queries [E, H, R, Dk] of a segment's entries, as its keys ask for them, in the query's precision."""
    query, frame, q_map, head = call.query, segment.frame, segment.q_map, segment.head
    entries, heads, dim = segment.owner.numel(), segment.keys.shape[1], query.shape[3]
    half = 0 if frame is None else frame.cos.shape[1]
    channels = dim if q_map is None else q_map.shape[2]
    out = query.new_empty(entries, heads, call.rows, channels)
    rows = block(entries * call.rows, most=_TILE_ROWS)
    columns = block(channels, most=64)
    turn_queries[(-(-entries * call.rows // rows), heads, 1 if q_map is None else -(-channels // columns))](
        query, *query.stride()[:3], segment.owner, segment.owner if head is None else head,
        query if frame is None else frame.cos, query if frame is None else frame.sin,
        query if q_map is None else q_map, *((0, 0, 0) if q_map is None else q_map.stride()), out, entries,
        **call.constants, Q=call.queries, D=dim, HALF=half, DK=channels, HEAD=head is not None, FRAME=frame is not None,
        MAP=q_map is not None, BLOCK_R=rows, BLOCK_H=block(half), BLOCK_D=block(dim - 2 * half), BLOCK_K=columns,
    )  # fmt: skip
    return out


class Stored(NamedTuple):
    """Stored rows as score_rows and weigh_rows take them."""

    data: torch.Tensor
    entry: int
    """Stride."""
    head: int
    """Stride; 0 for coded rows, whose sets of heads lie as their widths say."""
    step: torch.Tensor
    zero: torch.Tensor
    cells: torch.Tensor
    groups: int
    """Of eight rows."""
    sharing: int
    """KV heads that read the same rows."""
    constants: dict[str, Any]

    @classmethod
    def of(cls, rows: Rows) -> "Stored":
        count = rows.shape[2]
        if isinstance(rows, CodedRows):
            coding = rows.coding
            widths = [kind.width for kind in coding.layout.classes] or [1]
            kind = {"KIND": CODED, "BITS": 8, "WIDEST": max(widths), "THREES": 3 in widths}
            return cls(rows.packed, rows.packed.stride(0), 0, coding.step, coding.step, coding.cells, count // 8, coding.heads, kind)
        kind = {"KIND": RAW, "BITS": 8, "WIDEST": 8, "THREES": False}
        if isinstance(rows, QuantizedRows):
            kind |= {"KIND": QUANTISED, "BITS": rows.bits}
            return cls(rows.codes, rows.codes.stride(0), rows.codes.stride(1), rows.step, rows.zero, rows.codes, -(-count // 8), 1, kind)
        assert isinstance(rows, torch.Tensor)
        return cls(rows, rows.stride(0), rows.stride(1), rows, rows, rows, 0, 1, kind)


def offset_part(rows: Rows, x_EHRC: torch.Tensor, transposed: bool) -> torch.Tensor:
    """What the offset of coded rows [S, M, C] adds to all entries: x offset^T (of keys) or x offset (of values), [S, E, rows of a set, *].

    A product with what all entries share: one matrix product for all of them, and no part of a kernel that works entry by entry.
    """
    if not isinstance(rows, CodedRows):
        return x_EHRC
    offset = rows.coding.offset.float()
    entries = x_EHRC.shape[0]
    x_SRC: torch.Tensor = x_EHRC.float().unflatten(1, (len(offset), -1)).transpose(0, 1).flatten(1, 3)
    part: torch.Tensor = (x_SRC @ (offset.transpose(1, 2) if transposed else offset)).unflatten(1, (entries, -1))
    return part.contiguous()


def producer(call: Call, segment: Segment) -> Producer:
    """Outputs in the channels of the segment's values."""
    entries, heads = segment.owner.numel(), segment.keys.shape[1]

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        q_EHRK = turned(call, segment)
        z_EHRM = _scored(call, segment, q_EHRK)
        w_EHRM = _weights(call, segment, z_EHRM, lse)
        _weighed(call, segment, w_EHRM, out)

    return Producer([Part(index_of(segment, call.batch, call.heads), entries * heads, 1)], write)


def _scored(call: Call, segment: Segment, q_EHRK: torch.Tensor) -> torch.Tensor:
    entries, heads, stored, channels = segment.keys.shape
    rows = Stored.of(segment.keys)
    z = call.empty(entries, heads, call.rows, stored)
    sets, shared = heads // rows.sharing, call.rows * rows.sharing
    columns = block(stored, most=64)
    score_rows[(entries, sets, -(-stored // columns))](
        q_EHRK, rows.data, rows.entry, rows.head, rows.step, rows.zero, rows.cells, offset_part(segment.keys, q_EHRK, True), z, stored,
        rows.groups, call.scale * LOG2E, RS=shared, DK=channels, DOT=dot_type(call.query.dtype), PRECISION=call.constants["PRECISION"],
        BLOCK_R=block(shared), BLOCK_M=columns, BLOCK_K=block(channels, most=64), **rows.constants,
    )  # fmt: skip
    return z


def _weights(call: Call, segment: Segment, z_EHRM: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    entries, heads, _, stored = z_EHRM.shape
    score_map, value_map = segment.score_map, segment.value_map
    weights = segment.values.shape[2]
    w = call.empty(entries, heads, call.rows, weights)
    rows, columns = block(entries * call.rows, most=_TILE_ROWS), block(weights, most=128)
    none = z_EHRM

    def of(map_: torch.Tensor | None) -> tuple[torch.Tensor, int, int, int]:
        return (none, 0, 0, 0) if map_ is None else (map_, map_.stride(0), map_.stride(1), map_.stride(2))

    def sharing(map_: torch.Tensor | None) -> int:
        return 1 if map_ is None else heads // map_.shape[0]

    map_scores[(-(-entries * call.rows // rows), heads, -(-weights // columns))](
        z_EHRM, *of(score_map), *of(value_map), none if segment.bias is None else segment.bias,
        none if segment.mask is None else segment.mask.view(torch.uint8), w, lse, entries, heads, sharing(score_map), sharing(value_map),
        segment.tokens, stored, weights, **call.constants, SCORES=score_map is not None, VALUES=value_map is not None,
        HAS_BIAS=segment.bias is not None, HAS_MASK=segment.mask is not None, BLOCK_R=rows, BLOCK_N=block(segment.tokens, most=64),
        BLOCK_M=block(stored, most=32), BLOCK_W=columns,
    )  # fmt: skip
    return w


def _weighed(call: Call, segment: Segment, w_EHRM: torch.Tensor, out: torch.Tensor) -> None:
    entries, heads, stored, channels = segment.values.shape
    rows = Stored.of(segment.values)
    sets, shared = heads // rows.sharing, call.rows * rows.sharing
    columns = block(channels, most=64)
    mask = segment.mask if segment.value_map is None else None
    weigh_rows[(entries, sets, -(-channels // columns))](
        w_EHRM, rows.data, rows.entry, rows.head, rows.step, rows.zero, rows.cells, offset_part(segment.values, w_EHRM, False),
        w_EHRM if mask is None else mask.view(torch.uint8), out, stored, rows.groups, RS=shared, DV=channels,
        DOT=dot_type(call.query.dtype), HAS_MASK=mask is not None, PRECISION=call.constants["PRECISION"], BLOCK_R=block(shared),
        BLOCK_M=block(stored, most=64), BLOCK_V=columns, **rows.constants,
    )  # fmt: skip
