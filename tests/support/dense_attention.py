"""Attention over segments worked out in float64 as ordinary attention: one row, head and query at a time, over keys and
values that are expanded to every token."""

import math

import torch

from kvcapsule.codec.kvcapsule import MlpRows
from kvcapsule.segments.coefficient_rows import CodedRows
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.pooled_segment import PooledSegment
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.segment import Segment
from support import slow_decode

Expanded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def stored_rows(rows: object, entry: int, head: int) -> torch.Tensor:
    """[M, D] as read, worked out one number at a time."""
    if isinstance(rows, torch.Tensor):
        return rows[entry, head].double()
    if isinstance(rows, MlpRows):
        codec, x = rows.codec, rows.rows[entry, head].double()
        inner = codec.inner[head].double() @ x + codec.inner_bias[head]
        return (
            codec.outer[head].double() @ (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) + codec.outer_bias[head]
        )
    if isinstance(rows, CodedRows):
        return slow_decode.coded(rows, entry, head)
    if isinstance(rows, GroupedRows):
        return slow_decode.grouped(rows, entry, head)
    assert isinstance(rows, QuantizedRows)
    return slow_decode.quantized(rows, entry, head)


def expand(segment: Segment, entry: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One entry's tokens that are there, as ordinary attention has them: keys [n, D], values [n, D] and what is added
    to their scores [n]."""
    keys, values, bias, there = _expanded(segment, entry, head)
    return keys[there], values[there], bias[there]


def _expanded(segment: Segment, entry: int, head: int) -> Expanded:
    """The same of all tokens, and which of them are there."""
    heads, place = segment.keys.shape[1], entry
    if isinstance(segment, PooledSegment):
        assert segment.place is not None
        place = int(segment.place[entry])
    keys, values = stored_rows(segment.keys, place, head), stored_rows(segment.values, place, head)
    if segment.score_map is not None:
        keys = segment.score_map[head * len(segment.score_map) // heads].double() @ keys
    if segment.q_map is not None:
        keys = keys @ segment.q_map[head].double().T
    if segment.frame is not None:
        keys = _turned(keys, segment.frame.cos[place], segment.frame.sin[place], segment.frame.interleaved)
    if segment.value_map is not None:
        values = segment.value_map[head * len(segment.value_map) // heads].double() @ values
    if segment.value_mean is not None:
        values = values + segment.value_mean[head].double()
    if segment.out_map is not None:
        values = values @ segment.out_map[head].double()
    bias = torch.zeros(len(keys), dtype=keys.dtype) if segment.bias is None else segment.bias[place, head].double()
    there = torch.ones(len(keys), dtype=torch.bool) if segment.mask is None else segment.mask[entry]
    if isinstance(segment, PooledSegment) and segment.counts is not None:
        there = torch.arange(len(keys)) < segment.counts[entry]
    return keys, values, bias, there


def _turned(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """Keys [n, D] whose pairs of channels are turned, as complex numbers; the first 2 R channels alone."""
    half = len(cos)
    pairs = range(half)
    first, second = (
        ([2 * i for i in pairs], [2 * i + 1 for i in pairs]) if neighbours else (pairs, range(half, 2 * half))
    )
    turned = torch.complex(keys[:, list(first)], keys[:, list(second)]) * torch.complex(cos.double(), sin.double())
    out = keys.clone()
    out[:, list(first)], out[:, list(second)] = turned.real, turned.imag
    return out


def attention(
    query: torch.Tensor, segments: list[Segment], scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention in float64, and 0 where a query sees no token.

    Args:
        query: [B, H * G, Q, D].
        segments: the last holds all KV heads, H.
        scale: of the scores.
        visible: [E, Q, N] of the last segment's entries: which of its tokens each query sees; None: all.
    """
    out = torch.full(query.shape, torch.nan, dtype=torch.float64)
    heads = segments[-1].keys.shape[1]
    group = query.shape[1] // heads
    for row in range(query.shape[0]):
        for head in range(heads):
            parts = [
                (*_expanded(s, e, head if s.head is None else 0), s, e)
                for s in segments
                for e in (s.owner == row).nonzero()[:, 0].tolist()
                if s.head is None or int(s.head[e]) == head
            ]
            for q in range(query.shape[2]):
                seen = []
                for keys, values, bias, there, segment, entry in parts:
                    cut = there if visible is None or segment is not segments[-1] else there & visible[entry, q]
                    seen.append((keys[cut], values[cut], bias[cut]))
                for q_head in range(head * group, (head + 1) * group):
                    out[row, q_head, q] = _one(query[row, q_head, q].double() * scale, seen)
    return out


def _one(query: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    if not sum(len(bias) for *_, bias in seen):
        return torch.zeros_like(query)
    keys, values, bias = (torch.cat(x) for x in zip(*seen, strict=True))
    return torch.softmax(keys @ query + bias, dim=0) @ values
