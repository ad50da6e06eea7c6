"""Attention over a list of segments by Triton kernels, with the signature of kvcapsule.kernels.reference.attend.

The launches of one call, for a layer's capsules, text and tail; each but the last leaves partial results:

    row launches       all segments whose rows are tokens, together where channels and precision agree
    a mapped segment   derotated queries, scores, maps, weights (kvcapsule.kernels.triton.tile_kernels)
    reference          segments that no kernel covers, by the predicates of kvcapsule.kernels.triton.plan
    combine            all partial results of a batch row and KV head, joined into the output

A segment with value_mean or out_map is combined by itself first, because both are applied once to a batch row's sum,
not once to a tile.
"""

from collections.abc import Sequence

import torch

from ...segments.segment import Segment
from .. import reference
from . import row_launch, tile_launch
from .arguments import Queries, block
from .call import Call, Part, Producer
from .combine import Shape, Source
from .combine import combine as combine_kernel
from .loads import LOG2E
from .plan import covers, index_of, index_of_slots, route, table


def attend(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """As reference.attend, which computes what `plan.covers` excludes.

    Raises:
        ValueError: without a segment.
    """
    if not segments:
        raise ValueError("attention needs at least one segment.")
    heads = max(s.keys.shape[1] if s.head is None else 0 for s in segments)
    if heads == 0 or query.shape[1] % heads or not covers(query, segments, heads):
        return reference.attend(query, segments, scale, visible)
    call = Call(query, scale, heads)
    q_BHGQD = query.float().unflatten(1, (heads, -1))
    fetched = [s.for_query(q_BHGQD, scale) for s in segments]
    out = query.new_empty(query.shape)
    # Triton launches on the current device, which need not be the tensors' own where a model is spread over several.
    with torch.cuda.device_of(query):
        combine(call, _producers(call, fetched, visible), out)
    return out


def combine(
    call: Call, producers: Sequence[Producer], joined: torch.Tensor, joined_lse: torch.Tensor | None = None
) -> None:
    """Run producers, and join their partial results into joined [B, H * G, Q, D] and joined_lse [B * H, R] (base 2)."""
    dim = joined.shape[3]
    if not producers:
        joined.zero_()
        return
    total = sum(p.results for p in producers)
    out, lse = call.empty(total, call.rows, dim), call.empty(total, call.rows)
    first, sources = 0, []
    for producer in producers:
        producer.write(out[first : first + producer.results], lse[first : first + producer.results])
        for part in producer.parts:
            order, bounds = part.units_of_slots
            sources.append(Source(first, part.splits, order.data_ptr(), bounds.data_ptr()))
            first += part.units * part.splits
    # The tail, which is last, is divided into more splits as it grows; all else stays what it was.
    tail_splits = sources[-1].splits
    sources[-1] = sources[-1]._replace(splits=0)
    combine_kernel[(call.batch * call.heads, call.rows)](
        table(tuple(n for source in sources for n in source), out.device), len(sources), tail_splits, out, lse,
        Queries.of(joined), joined_lse, SHAPE=Shape(call.rows, call.queries, call.heads, dim),
        BLOCK_P=16, BLOCK_D=block(dim),
    )  # fmt: skip


def _producers(call: Call, segments: Sequence[Segment], visible: torch.Tensor | None) -> list[Producer]:
    """For every segment with tokens; the tail's comes last."""
    plain: list[Segment] = []
    producers: list[Producer] = []
    last = len(segments) - 1
    for i, segment in enumerate(segments):
        if segment.owner.numel() == 0 or segment.tokens == 0:
            continue
        masked = visible if i == last else None
        kind = route(segment, call.rows, masked is not None)
        if kind == "reference":
            producers.append(_by_reference(call, segment, masked))
        elif kind == "maps":
            producers.append(_with_output_maps(call, segment, tile_launch.producer(call, segment)))
        elif segment.out_map is not None or segment.value_mean is not None:
            producers.append(_with_output_maps(call, segment, row_launch.producer(call, [segment], masked)))
        else:
            plain.append(segment)
    tail = segments[-1]
    for launch in row_launch.group_by_launch(plain):
        producers.append(row_launch.producer(call, launch, visible if launch[-1] is tail else None))
    return producers


def _by_reference(call: Call, segment: Segment, visible: torch.Tensor | None) -> Producer:
    """A segment that plain PyTorch computes."""

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        query = call.query.float().unflatten(1, (call.heads, -1))
        partial, mass = reference.segment_partial(query, segment, call.scale, visible)
        out.copy_(partial.reshape(out.shape))
        lse.copy_(mass.reshape(lse.shape) * LOG2E.value)

    index = index_of(segment, call.batch, call.heads)
    return Producer([Part(index, segment.owner.numel() * segment.keys.shape[1], 1)], write)


def _with_output_maps(call: Call, segment: Segment, producer: Producer) -> Producer:
    """One partial result a slot: the producer's, joined, plus value_mean, times out_map. Without both: `producer`."""
    if segment.value_mean is None and segment.out_map is None:
        return producer

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        batch, query_heads, queries, _ = call.query.shape
        joined = call.empty(batch, query_heads, queries, segment.values.shape[3])
        combine(call, [producer], joined, lse)
        out_BHRC = joined.view(batch, call.heads, call.rows, -1)
        if segment.value_mean is not None:
            out_BHRC = out_BHRC + segment.value_mean.float()[:, None]
        if segment.out_map is not None:
            out_BHRC = torch.einsum("bhrc,hcd->bhrd", out_BHRC, segment.out_map.float().expand(call.heads, -1, -1))
        out.copy_(out_BHRC.reshape(out.shape))

    slots = call.batch * call.heads
    return Producer([Part(index_of_slots(slots, call.query.device), slots, 1)], write)
