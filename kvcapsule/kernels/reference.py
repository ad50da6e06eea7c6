"""Attention over a list of segments in plain PyTorch: the ground truth. Scores, softmax and merge are in fp32 (fp64 for fp64 queries).

Nothing here expands keys or values along the token axis: only scores and probabilities (one number a token and query) have the logical
length, but for packed rows, whose `read` says itself what it builds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..segment import Segment, read


class Partial(NamedTuple):
    """Attention over one segment's entries alone: their outputs and the log of their softmax mass."""

    out: torch.Tensor
    """[E, H, G, Q, D]."""
    lse: torch.Tensor
    """[E, H, G, Q]; -inf where an entry has no visible token."""
    owner: torch.Tensor
    """[E]."""
    head: torch.Tensor | None = None
    """[E]: the KV head of each entry, where H is 1 and the query has more."""


def attend(query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention of queries over all tokens of their row's segments jointly.

    Args:
        query: [B, H * G, Q, D], rotated as the model does.
        segments: at least one token must be visible to every query, and one segment must hold all KV heads (the tail does).
        scale: factor of the scores.
        visible: [E, Q, N] bool of the LAST segment (the tail): which of its tokens each query sees. None: all.

    Returns: [B, H * G, Q, D] in the query's dtype.
    """
    if not segments:
        raise ValueError("attention needs at least one segment.")
    heads = max(s.keys.shape[1] if s.head is None else 0 for s in segments)
    if heads == 0:
        raise ValueError("all segments are of single KV heads: one of all heads (the tail, which may be empty) tells how many there are.")
    batch, query_heads, n_queries, dim = query.shape
    if query_heads % heads:
        raise ValueError(f"{query_heads} query heads cannot share {heads} KV heads evenly.")
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    q_BHGQD = query.to(work).view(batch, heads, query_heads // heads, n_queries, dim)
    last = len(segments) - 1
    partials = [
        segment_partial(q_BHGQD, s.for_query(q_BHGQD, scale), scale, visible if i == last else None) for i, s in enumerate(segments)
    ]
    return merge(partials, batch, heads).view(batch, query_heads, n_queries, dim).to(query.dtype)


def segment_partial(q_BHGQD: torch.Tensor, segment: Segment, scale: float, visible: torch.Tensor | None = None) -> Partial:
    """Attention over one segment, normalised within each entry."""
    work = q_BHGQD.dtype
    groups, n_queries = q_BHGQD.shape[2], q_BHGQD.shape[3]
    q = q_BHGQD[segment.owner] if segment.head is None else q_BHGQD[segment.owner, segment.head][:, None]
    q = q.flatten(2, 3)  # [E, H, G * Q, D]
    if segment.frame is not None:
        q = segment.frame.back(q)
    if segment.q_map is not None:
        q = _mapped(q, segment.q_map)
    scores = (q * scale) @ read(segment.keys, work).transpose(-1, -2)
    if segment.score_map is not None:
        scores = _mapped(scores, segment.score_map.transpose(-1, -2))
    if segment.bias is not None:
        scores = scores + segment.bias.to(work)[:, :, None]
    scores = scores.unflatten(2, (groups, n_queries))
    if segment.mask is not None:
        scores = scores.masked_fill(~segment.mask[:, None, None, None], -torch.inf)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    top = scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(work).min)
    weights = (scores - top).exp()
    mass = weights.sum(dim=-1)
    probabilities = (weights / mass.clamp_min(torch.finfo(work).tiny)[..., None]).flatten(2, 3)
    total = probabilities.sum(dim=-1, keepdim=True)
    if segment.value_map is not None:
        probabilities = _mapped(probabilities, segment.value_map)
    out = probabilities @ _seen_values(segment, visible, work)
    if segment.value_mean is not None:
        out = out + total * segment.value_mean.to(work)[:, None]
    if segment.out_map is not None:
        out = _mapped(out, segment.out_map)
    return Partial(out.unflatten(2, (groups, n_queries)), mass.log() + top[..., 0], segment.owner, segment.head)


def _mapped(x_EHRM: torch.Tensor, map_HMN: torch.Tensor) -> torch.Tensor:
    """x map, where all entries share the map (and neighbouring heads, where it has fewer): a broadcast product would copy it for each."""
    x_ESGRM = x_EHRM.unflatten(1, (map_HMN.shape[0], -1))
    return torch.einsum("esgrm,smn->esgrn", x_ESGRM, map_HMN.to(x_EHRM.dtype)).flatten(1, 2)


def _seen_values(segment: Segment, visible: torch.Tensor | None, work: torch.dtype) -> torch.Tensor:
    """The stored values, zero where no query sees the token: a probability of 0 would not silence what is not a number there."""
    values = read(segment.values, work)
    if segment.value_map is not None:
        return values
    if segment.mask is not None:
        values = values.masked_fill(~segment.mask[:, None, :, None], 0.0)
    if visible is not None:
        values = values.masked_fill(~visible.any(dim=1)[:, None, :, None], 0.0)
    return values


def merge(partials: Sequence[Partial], batch: int, heads: int) -> torch.Tensor:
    """Join partial attentions by log-sum-exp into [B, H, G, Q, D]."""
    out = torch.cat([p.out.flatten(0, 1) for p in partials])
    lse = torch.cat([p.lse.flatten(0, 1) for p in partials])
    slot = torch.cat([_slots(p, heads) for p in partials])
    index = slot.view(-1, 1, 1).expand_as(lse)
    # A query that sees nothing at all (padding) gets 0, not what is not a number.
    slots = (batch * heads, *lse.shape[1:])
    top = lse.new_full(slots, -torch.inf).scatter_reduce(0, index, lse, "amax").clamp_min(torch.finfo(lse.dtype).min)
    share = (lse - top[slot]).exp()
    mass = torch.zeros_like(top).index_add(0, slot, share)
    weighted = (out * share[..., None]).masked_fill((share == 0)[..., None], 0.0)
    joined = out.new_zeros((*slots, out.shape[-1])).index_add(0, slot, weighted)
    return (joined / mass.clamp_min(torch.finfo(lse.dtype).tiny)[..., None]).view(batch, heads, *out.shape[1:])


def _slots(partial: Partial, heads: int) -> torch.Tensor:
    """[E * H]: the row and KV head, counted through, that each piece belongs to."""
    if partial.head is not None:
        return partial.owner * heads + partial.head
    return (partial.owner[:, None] * heads + torch.arange(heads, device=partial.owner.device)).flatten()
