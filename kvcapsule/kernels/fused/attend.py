"""Attention over a list of segments by the kernels: the signature and the meaning of kvcapsule.kernels.reference.attend.

What happens in a call, for a layer's capsules, text and tail:

    rows launch(es)     all segments of plain rows at once, where channels and precision agree          -> partial results
    a mapped segment    turned queries, scores, maps, weights (kvcapsule.kernels.fused.maps)            -> partial results
    reference           what no kernel covers, by the predicates of kvcapsule.kernels.fused.plan        -> partial results
    combine             all partial results of a batch row and KV head                                  -> the output

A segment with value_mean or out_map is combined by itself first, for both are applied once a batch row and not once a tile.
"""

from collections.abc import Sequence

import torch

from ...segments.segment import Segment
from .. import reference
from . import mapped, rowed
from .call import Call, Part, Producer
from .combine import combine as combine_kernel
from .device import LOG2E, block
from .plan import covers, index_of, route, slot_index, table


def attend(query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """As reference.attend, which serves what `plan.covers` excludes."""
    if not segments:
        raise ValueError("attention needs at least one segment.")
    heads = max(s.keys.shape[1] if s.head is None else 0 for s in segments)
    if heads == 0 or query.shape[1] % heads or not covers(query, segments, heads):
        return reference.attend(query, segments, scale, visible)
    call = Call(query, scale, heads)
    q_BHGQD = query.float().unflatten(1, (heads, -1))
    read = [s.for_query(q_BHGQD, scale) for s in segments]
    out = query.new_empty(query.shape)
    # Triton launches on the current device, which need not be the tensors' own where a model is spread over several.
    with torch.cuda.device_of(query):
        combine(call, _producers(call, read, visible), out)
    return out


def combine(call: Call, producers: Sequence[Producer], joined: torch.Tensor, joined_lse: torch.Tensor | None = None) -> None:
    """Let producers write their partial results, and join these into joined [B, H * G, Q, D] and joined_lse [B * H, R] (base 2)."""
    dim = joined.shape[3]
    if not producers:
        joined.zero_()
        return
    total = sum(p.results for p in producers)
    out, lse = call.empty(total, call.rows, dim), call.empty(total, call.rows)
    first, lines = 0, []
    for producer in producers:
        producer.write(out[first : first + producer.results], lse[first : first + producer.results])
        for part in producer.parts:
            lines.append((first, part.splits, part.places.order.data_ptr(), part.places.bounds.data_ptr()))
            first += part.units * part.splits
    # The tail, which is last, is cut into more pieces as it grows; all else stays what it was.
    tail_splits = lines[-1][1]
    lines[-1] = (lines[-1][0], 0, *lines[-1][2:])
    combine_kernel[(call.batch * call.heads, call.rows)](
        table(tuple(n for line in lines for n in line), out.device), len(lines), tail_splits, out, lse, joined, *joined.stride()[:3],
        lse if joined_lse is None else joined_lse, R=call.rows, Q=call.queries, H=call.heads, D=dim, LSE=joined_lse is not None,
        BLOCK_P=16, BLOCK_D=block(dim),
    )  # fmt: skip


def _producers(call: Call, segments: Sequence[Segment], visible: torch.Tensor | None) -> list[Producer]:
    """For every segment with tokens; the tail's comes last."""
    plain: list[Segment] = []
    found: list[Producer] = []
    last = len(segments) - 1
    for i, segment in enumerate(segments):
        if segment.owner.numel() == 0 or segment.tokens == 0:
            continue
        masked = visible if i == last else None
        kind = route(segment, call.rows, masked is not None)
        if kind == "reference":
            found.append(_by_reference(call, segment, masked))
        elif kind == "maps":
            found.append(_finished(call, segment, mapped.producer(call, segment)))
        elif segment.out_map is not None or segment.value_mean is not None:
            found.append(_finished(call, segment, rowed.producer(call, [segment], masked)))
        else:
            plain.append(segment)
    tail = segments[-1]
    for launch in rowed.launches(plain):
        found.append(rowed.producer(call, launch, visible if launch[-1] is tail else None))
    return found


def _by_reference(call: Call, segment: Segment, visible: torch.Tensor | None) -> Producer:
    """One that plain PyTorch works out."""

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        query = call.query.float().unflatten(1, (call.heads, -1))
        found, mass = reference.segment_partial(query, segment, call.scale, visible)
        out.copy_(found.reshape(out.shape))
        lse.copy_(mass.reshape(lse.shape) * LOG2E)

    return Producer([Part(index_of(segment, call.batch, call.heads), segment.owner.numel() * segment.keys.shape[1], 1)], write)


def _finished(call: Call, segment: Segment, own: Producer) -> Producer:
    """What `own` finds in the channels of the segment's values, in those of the model."""
    if segment.value_mean is None and segment.out_map is None:
        return own

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        batch, query_heads, queries, _ = call.query.shape
        joined = call.empty(batch, query_heads, queries, segment.values.shape[3])
        combine(call, [own], joined, lse)
        found_BHRC = joined.view(batch, call.heads, call.rows, -1)
        if segment.value_mean is not None:
            found_BHRC = found_BHRC + segment.value_mean.float()[:, None]
        if segment.out_map is not None:
            found_BHRC = torch.einsum("bhrc,hcd->bhrd", found_BHRC, segment.out_map.float().expand(call.heads, -1, -1))
        out.copy_(found_BHRC.reshape(out.shape))

    slots = call.batch * call.heads
    return Producer([Part(slot_index(slots, call.query.device), slots, 1)], write)
