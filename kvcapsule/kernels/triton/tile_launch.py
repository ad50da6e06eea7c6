"""Tile launch: the four stages of a mapped segment, and derotated queries for any segment."""

import torch

from ...segments.coefficient_rows import CodedRows
from ...segments.mixed_width_rows import MixedWidthRows
from ...segments.packed_rows import Rows
from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import Segment
from .arguments import Map, MapSizes, Product, Queries, Rotation, RowFormat, StoredRows, as_bytes, block
from .call import Call, Part, Producer
from .loads import CODED, LOG2E, MIXED, QUANTISED, RAW
from .plan import index_of
from .tile_kernels import derotate_queries, map_scores, score_rows, weigh_rows

_TILE_ROWS = 64
"""(entry, row) pairs that share a block of a map."""


def derotated_queries(call: Call, segment: Segment) -> torch.Tensor:
    """Queries [E, H, R, Dk] in the frames of the segment's entries and the channels of its keys, in their own dtype."""
    frame, q_map = segment.frame, segment.q_map
    entries, heads, channels = segment.owner.numel(), segment.keys.shape[1], call.query.shape[3]
    half = 0 if frame is None else frame.cos.shape[1]
    channels_out = channels if q_map is None else q_map.shape[2]
    out = call.query.new_empty(entries, heads, call.rows, channels_out)
    rows = block(entries * call.rows, most=_TILE_ROWS)
    columns = block(channels_out, most=64)
    grid = (-(-entries * call.rows // rows), heads, 1 if q_map is None else -(-channels_out // columns))
    derotate_queries[grid](
        Queries.of(call.query), segment.owner, segment.head, None if frame is None else Rotation(frame.cos, frame.sin),
        Map.of(q_map, heads), out, entries, ROWS=call.rows, QUERIES=call.queries, CHANNELS=channels, HALF=half,
        CHANNELS_OUT=channels_out, PRECISION=call.product.precision, BLOCK_R=rows,
        BLOCK_C=block(max(half, channels - 2 * half)), BLOCK_K=columns,
    )  # fmt: skip
    return out


def producer(call: Call, segment: Segment) -> Producer:
    """The partial results of a mapped segment, in the channels of its values."""
    entries, heads = segment.owner.numel(), segment.keys.shape[1]

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        z_EHRM = _score(call, segment, derotated_queries(call, segment))
        _weigh(call, segment, _map(call, segment, z_EHRM, lse), out)

    return Producer([Part(index_of(segment, call.batch, call.heads), entries * heads, 1)], write)


def _score(call: Call, segment: Segment, q_EHRD: torch.Tensor) -> torch.Tensor:
    """z [E, H, R, M], times log2(e)."""
    entries, heads, stored, channels = segment.keys.shape
    sets = _sets(segment.keys)
    z = call.empty(entries, heads, call.rows, stored)
    rows, columns = call.rows * heads // sets, block(stored, most=64)
    keys = _stored_rows(segment.keys, _offset_product(segment.keys, q_EHRD, transposed=True))
    score_rows[(entries, sets, -(-stored // columns))](
        q_EHRD, keys, z, call.scale * LOG2E.value, ROWS=rows, CHANNELS=channels,
        FORMAT=_format(segment.keys, call.product), BLOCK_R=block(rows), BLOCK_M=columns,
        BLOCK_C=block(channels, most=64),
    )  # fmt: skip
    return z


def _map(call: Call, segment: Segment, z_EHRM: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """w [E, H, R, M'], and lse."""
    entries, heads, _, stored = z_EHRM.shape
    weights = segment.values.shape[2]
    w = call.empty(entries, heads, call.rows, weights)
    rows, columns = block(entries * call.rows, most=_TILE_ROWS), block(weights, most=128)
    map_scores[(-(-entries * call.rows // rows), heads, -(-weights // columns))](
        z_EHRM, Map.of(segment.score_map, heads), Map.of(segment.value_map, heads), segment.bias,
        as_bytes(segment.mask), w, lse, MapSizes(entries, heads, segment.tokens, stored, weights),
        ROWS=call.rows, PRECISION=call.product.precision, BLOCK_R=rows,
        BLOCK_N=block(segment.tokens, most=64), BLOCK_M=block(stored, most=32), BLOCK_W=columns,
    )  # fmt: skip
    return w


def _weigh(call: Call, segment: Segment, w_EHRM: torch.Tensor, out: torch.Tensor) -> None:
    """Into out [E * H, R, D], the channels of the values."""
    entries, heads, stored, channels = segment.values.shape
    sets = _sets(segment.values)
    rows, columns = call.rows * heads // sets, block(channels, most=64)
    values = _stored_rows(segment.values, _offset_product(segment.values, w_EHRM, transposed=False))
    mask = segment.mask if segment.value_map is None else None
    weigh_rows[(entries, sets, -(-channels // columns))](
        w_EHRM, values, as_bytes(mask), out, ROWS=rows, CHANNELS=channels, FORMAT=_format(segment.values, call.product),
        BLOCK_R=block(rows), BLOCK_M=block(stored, most=64), BLOCK_C=columns,
    )  # fmt: skip


def _sets(rows: Rows) -> int:
    """S: sets of KV heads that share their rows."""
    return rows.shape[1] // (rows.coding.heads if isinstance(rows, CodedRows) else 1)


def _stored_rows(rows: Rows, offset_product: torch.Tensor | None) -> StoredRows:
    count = rows.shape[2]
    if isinstance(rows, CodedRows):
        packed, coding = rows.packed, rows.coding
        return StoredRows(
            packed, packed.stride(0), 0, count, count // 8, coding.scale, None, coding.cells, offset_product
        )
    if isinstance(rows, QuantizedRows):
        entry_stride, set_stride = rows.codes.stride()[:2]
        return StoredRows(rows.codes, entry_stride, set_stride, count, -(-count // 8), rows.scale, rows.minimum)
    if isinstance(rows, MixedWidthRows):
        form, side = rows.form, rows.side
        return StoredRows(
            rows.packed, rows.packed.stride(0), 0, count, 0, form.unit, form.centre, None, None,
            side, form.places, form.side_places, form.firsts, side.shape[1],
        )  # fmt: skip
    assert isinstance(rows, torch.Tensor)
    entry_stride, set_stride = rows.stride()[:2]
    return StoredRows(rows, entry_stride, set_stride, count, 0)


def _format(rows: Rows, product: Product) -> RowFormat:
    if isinstance(rows, CodedRows):
        widths = [kind.width for kind in rows.coding.layout.classes] or [1]
        return RowFormat(CODED.value, 0, max(widths), 3 in widths, product)
    if isinstance(rows, QuantizedRows):
        return RowFormat(QUANTISED.value, rows.bits, 0, False, product)
    return RowFormat(MIXED.value if isinstance(rows, MixedWidthRows) else RAW.value, 0, 0, False, product)


def _offset_product(rows: Rows, x_EHRC: torch.Tensor, transposed: bool) -> torch.Tensor | None:
    """x offset^T (of coded keys) or x offset (of coded values), [S, E, rows of a set, *]; None for other rows.

    All entries share the offset, so that one matrix product serves them all.
    """
    if not isinstance(rows, CodedRows):
        return None
    offset = rows.coding.offset.float()
    x_SRC: torch.Tensor = x_EHRC.float().unflatten(1, (len(offset), -1)).transpose(0, 1).flatten(1, 3)
    product: torch.Tensor = x_SRC @ (offset.transpose(1, 2) if transposed else offset)
    by_entry: torch.Tensor = product.unflatten(1, (x_EHRC.shape[0], -1))
    return by_entry.contiguous()
