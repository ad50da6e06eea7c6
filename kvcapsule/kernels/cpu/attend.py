"""Attention over segments on the CPU: one pass over each segment that the kernels cover, the reference's steps for all
others."""

import ctypes
from collections.abc import Sequence

import torch

from ...segments.pooled_segment import PooledSegment
from ...segments.segment import Segment
from .. import reference
from . import threads
from .arguments import Arguments, CCall, arguments
from .library import library

_MOST_ROWS = 64
"""Query rows of a KV head; more is work for matrix products."""


def attend(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """As kvcapsule.kernels.reference.attend."""
    read = split(query, segments, scale)
    covered = [args for _, args in read if args is not None]
    if not covered:
        return reference.attend(query, [segment for segment, _ in read], scale, visible)
    batch, query_heads, queries, dim = query.shape
    heads = _kv_heads(segments)
    rows = query_heads // heads * queries
    pieces = threads.count(rows * sum(args.work for args in covered))
    # Empty ones among them: of a layer whose others are of single KV heads they tell how many there are.
    rest = [segment for segment, args in read if args is None]
    if not any(segment.tokens and len(segment.owner) for segment in rest):
        rest = []
    last_is_covered = read[-1][1] is not None
    query = query.contiguous()
    out = torch.empty_like(query)
    # One part for each piece of the work, and one for what the reference reads.
    many = pieces + bool(rest), batch, heads, rows
    parts = out.new_empty(*many, dim), out.new_empty(many), out.new_zeros(many)
    if rest:
        shown = visible if rest[-1] is read[-1][0] else None
        for part, other in zip(parts, reference.summed(query, rest, scale, shown), strict=True):
            part[-1].copy_(other)
    visible = visible.contiguous() if visible is not None and last_is_covered else None
    addresses = (ctypes.c_void_p * len(covered))(*(ctypes.addressof(args.struct) for args in covered))
    call = CCall(
        query.data_ptr(), out.data_ptr(), batch, heads, rows, queries, dim, ctypes.addressof(addresses), len(covered),
        None if visible is None else visible.data_ptr(), *(part.data_ptr() for part in parts), len(parts[0]), pieces,
    )  # fmt: skip
    call.scale = scale
    kernels, place = library(), ctypes.addressof(call)
    call.workspace_size = kernels.kvcapsule_workspace_size(place)
    workspace = torch.empty(pieces * call.workspace_size + 16, dtype=torch.float32, device=query.device)
    # Vectors begin with lines of the cache.
    call.workspace = (workspace.data_ptr() + 63) // 64 * 64
    if pieces == 1:
        kernels.kvcapsule_run_piece(place, 0)
    elif (team := threads.openmp()) is not None:
        call.thread, call.threads = map(threads.address, (team.omp_get_thread_num, team.omp_get_num_threads))
        team.GOMP_parallel(threads.address(kernels.kvcapsule_run_thread), place, pieces, 0)
    else:
        list(threads.pool(pieces).map(lambda piece: kernels.kvcapsule_run_piece(place, piece), range(pieces)))
    kernels.kvcapsule_finish(place)
    return out


def split(query: torch.Tensor, segments: Sequence[Segment], scale: float) -> list[tuple[Segment, Arguments | None]]:
    """The segments that a query reads, each with what kernels are given of it: None where it is the reference's."""
    heads = _kv_heads(segments)
    rows = query.shape[1] // heads * query.shape[2] if heads and query.shape[1] % heads == 0 else 0
    learning = torch.is_grad_enabled() and query.requires_grad
    if query.dtype != torch.float32 or learning or not query.numel() or not 0 < rows <= _MOST_ROWS:
        return [(segment, None) for segment in segments]
    read = []
    for segment in segments:
        args = arguments(segment, heads) if isinstance(segment, PooledSegment) else None
        if args is None and type(segment).for_query is not Segment.for_query:
            segment = segment.for_query(query.unflatten(1, (heads, -1)), scale)
        read.append((segment, args or arguments(segment, heads)))
    rest = [segment for segment, args in read if args is None]
    if rest and all(segment.head is not None for segment in rest):
        # How many KV heads there are, the reference learns from a segment that holds all of them.
        i = max(i for i, (segment, _) in enumerate(read) if segment.head is None)
        read[i] = (read[i][0], None)
    return read


def _kv_heads(segments: Sequence[Segment]) -> int:
    return max((int(s.keys.shape[1]) for s in segments if s.head is None), default=0)
