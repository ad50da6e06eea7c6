"""Attention over segments on the CPU: one pass over each segment that a kernel covers, the reference's steps for all others."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from ...segments.segment import Segment
from .. import reference
from .flat import flat
from .forms import Sums
from .given import Given, form, given, seen
from .jit import U
from .joined import finish
from .read import COMPILED
from .share import run, threads
from .tiles import BLOCKS, kernel

_MOST_ROWS = 64
"""Query rows of a KV head; more is work for matrix products."""


def attend(query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """As kvcapsule.kernels.reference.attend."""
    covered, rest = _parted(query, segments, visible)
    if not covered:
        return reference.attend(query, segments, scale, visible, COMPILED)
    batch, query_heads, queries, dim = query.shape
    heads = covered[0].sets * covered[0].heads
    rows = query_heads // heads * queries
    q = flat(query.contiguous())
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    # What is found first is found where the result will be.
    parts = [_empty(batch * query_heads * queries, flat(result))]
    for each in covered:
        shares = threads(each.work * rows)
        while len(parts) < shares:
            parts.append(_empty(batch * query_heads * queries, np.empty(result.numel(), np.float32)))
        call, sizes = kernel(_block(each.heads * rows), each.kind), form(each.sets, each.heads, each.sizes, batch, rows)
        if each.kept:
            call = each.kept.by(call)

        def one(piece: int, each: Given = each, shares: int = shares, call=call, sizes=sizes) -> None:  # type: ignore[no-untyped-def]
            if each.kept:
                call(sizes, each.kept.room, q, np.float32(scale), parts[piece], U(piece), U(shares))
            else:
                call(sizes, each.entries, q, np.float32(scale), *each.arrays, parts[piece], U(piece), U(shares))

        run(one, range(shares))
    if rest:
        out, top, mass = reference.summed(query, rest, scale, visible if rest[-1] is segments[-1] else None, COMPILED)
        parts.append(Sums(*(flat(x.contiguous()) for x in (out, top.masked_fill(top == torch.inf, -torch.inf), mass))))
    finish(tuple(parts), U(batch * query_heads * queries), U(dim))
    return result


def _parted(query: torch.Tensor, segments: Sequence[Segment], visible: torch.Tensor | None) -> tuple[list[Given], list[Segment]]:
    """What kernels are given, and segments that they do not cover."""
    if query.dtype != torch.float32 or (torch.is_grad_enabled() and query.requires_grad) or not query.numel():
        return [], list(segments)
    made = [given(segment) for segment in segments]
    for i, one in enumerate(made):
        if one is not None and query.shape[1] // (one.sets * one.heads) * query.shape[2] > _MOST_ROWS:
            made[i] = None
    rest = [segment for segment, one in zip(segments, made, strict=True) if one is None]
    if rest and all(segment.head is not None for segment in rest):
        # How many KV heads there are, the reference learns from one that holds all of them.
        made = [*made[:-1], None]
        rest.append(segments[-1])
    if visible is not None and (tail := made[-1]) is not None:
        made[-1] = tail._replace(entries=seen(tail.entries, visible), kept=None)
    return [one for one in made if one is not None], rest


def _empty(rows: int, out: np.ndarray) -> Sums:
    """Nothing found yet: what `out` holds is not looked at."""
    top = np.empty(rows, np.float32)
    top.fill(-np.inf)
    return Sums(out, top, np.zeros(rows, np.float32))


@cache
def _block(rows: int) -> int:
    """The block size that fills up least; the largest of those."""
    return min(BLOCKS, key=lambda size: (-(-rows // size) * (size + 1), -size))
