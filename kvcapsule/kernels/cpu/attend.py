"""Attention over segments on the CPU: one pass over each segment that the kernels cover, the reference's steps for all others."""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

from ...segment import Segment
from .. import reference
from . import threads
from .arguments import Arguments, CCall, CRows, CSegment, arguments
from .library import library

_MOST_ROWS = 64
"""Query rows of a KV head; more is work for matrix products."""


def attend(query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """As kvcapsule.kernels.reference.attend."""
    segments, covered, rest = split(query, segments, scale)
    if not covered:
        return reference.attend(query, segments, scale, visible)
    batch, query_heads, queries, dim = query.shape
    heads = _kv_heads(segments)
    rows = query_heads // heads * queries
    query = query.contiguous()
    out = torch.empty_like(query)
    call = CCall(query.data_ptr(), out.data_ptr(), batch, heads, rows, queries, dim)
    addresses = (ctypes.c_void_p * len(covered))(*(each.address for each in covered))
    call.segments, call.count, call.scale = ctypes.addressof(addresses), len(covered), scale
    rest_visible, rest_sums = None, None
    if visible is not None:
        if rest and rest[-1] is segments[-1]:
            rest_visible = visible
        else:
            visible = visible.contiguous()
            call.visible = visible.data_ptr()
    if rest:
        sums, top, mass = reference.summed(query, rest, scale, rest_visible)
        # The reference's mark of a query that sees no token is the kernels' upside down.
        rest_sums = tuple(x.contiguous() for x in (sums, top.masked_fill(top == torch.inf, -torch.inf), mass))
        call.rest_sums, call.rest_top, call.rest_mass = (x.data_ptr() for x in rest_sums)
    call.pieces = threads.count(rows * sum(each.work for each in covered))
    if call.pieces > 1 and (team := threads.openmp()) is not None:
        call.thread, call.threads = team.thread, team.threads
    kernels, address = _kernels(), ctypes.addressof(call)
    workspace = torch.empty(kernels.kvcapsule_workspace(address) + 16)
    # Lines of the cache begin where vectors do.
    call.workspace = (workspace.data_ptr() + 63) // 64 * 64
    threads.run(call.pieces, lambda i: kernels.kvcapsule_run_piece(address, i), _address(kernels.kvcapsule_run_thread), address)
    kernels.kvcapsule_finish(address)
    return out


def split(query: torch.Tensor, segments: Sequence[Segment], scale: float) -> tuple[list[Segment], list[Arguments], list[Segment]]:
    """The segments that this query reads, what kernels are given of those that they cover, and the others."""
    heads = _kv_heads(segments)
    rows = query.shape[1] // heads * query.shape[2] if heads and query.shape[1] % heads == 0 else 0
    plain = query.dtype == torch.float32 and not (torch.is_grad_enabled() and query.requires_grad)
    if not plain or not query.numel() or not 0 < rows <= _MOST_ROWS:
        return list(segments), [], list(segments)
    found = []
    for segment in segments:
        if type(segment).for_query is not Segment.for_query:
            segment = segment.for_query(query.unflatten(1, (heads, -1)), scale)
        found.append((segment, arguments(segment, heads)))
    rest = [segment for segment, made in found if made is None and segment.tokens and len(segment.owner)]
    if rest and all(segment.head is not None for segment in rest):
        # How many KV heads there are, the reference learns from one that holds all of them.
        at = next(i for i in reversed(range(len(found))) if found[i][0].head is None)
        found[at] = (found[at][0], None)
        rest = [segment for segment, made in found if made is None]
    return [segment for segment, _ in found], [made for _, made in found if made is not None], rest


def _kv_heads(segments: Sequence[Segment]) -> int:
    return max((int(s.keys.shape[1]) for s in segments if s.head is None), default=0)


@cache
def _kernels() -> ctypes.CDLL:
    kernels = library()
    sizes = (ctypes.c_int64 * 3)()
    kernels.kvcapsule_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in (CRows, CSegment, CCall)]:
        raise RuntimeError("the structs of arguments.py are not those of structs.h.")
    return kernels


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
