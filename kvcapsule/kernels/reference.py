"""Reference implementation of attention over segments, in plain PyTorch, in fp32 (fp64 for fp64 queries).

It is the ground truth for all kernels. Keys and values are never expanded along the token axis: only scores and weights
(one number per token and query) have the logical length; what packed rows unpack is documented at their `read`. Maps
shared by a layer's tiles are applied to all tiles at once, and maps after the values to the sum over a batch row's
tiles. No operation waits for the device or depends on tensor contents, so a decode step can be compiled or captured.
"""

from collections.abc import Iterator, Sequence

import torch

from ..segments.packed_rows import AffineRows, Packed, Rows, read_sets
from ..segments.segment import Segment

_AT_ONCE = 2**21
"""Elements that packed rows of many entries are unpacked to at once."""


def attend(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention of queries over the tokens of all segments of their batch row.

    Args:
        query: [B, H * G, Q, D], rotated by the model.
        segments: at least one must hold all KV heads (the tail does).
        scale: scale of the scores.
        visible: [E, Q, N] bool for the LAST segment (the tail): which of its tokens each query sees. None: all.

    Returns: [B, H * G, Q, D] in the query's dtype; 0 for a query that sees no token, as padding may.
    """
    out, _, mass = summed(query, segments, scale, visible)
    out = out / mass.clamp_min(torch.finfo(out.dtype).tiny)[..., None]
    return out.view(query.shape).to(query.dtype)


def summed(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised attention: weighted sums of the values [B, H, G * Q, D], and per query the maximum score and the sum
    of the weights, [B, H, G * Q] each.

    A token's weight is e^(score - maximum). The maximum of a query that sees no token is infinite.
    """
    if not segments:
        raise ValueError("attention needs at least one segment.")
    heads = max(s.keys.shape[1] if s.head is None else 0 for s in segments)
    if heads == 0:
        raise ValueError(
            "all segments are of single KV heads: one of all heads (the tail, which may be empty) tells how many there"
            " are."
        )
    batch, query_heads, n_queries, dim = query.shape
    if query_heads % heads:
        raise ValueError(f"{query_heads} query heads cannot share {heads} KV heads evenly.")
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    q_BHGQD = query.to(work).view(batch, heads, query_heads // heads, n_queries, dim)
    last = len(segments) - 1
    fetched = [(s.for_query(q_BHGQD, scale), visible if i == last else None) for i, s in enumerate(segments)]
    # Segments without tokens have no maximum score and contribute nothing.
    fetched = [(s, seen) for s, seen in fetched if s.tokens and len(s.owner)]
    plain = [(s, seen) for s, seen in fetched if s.plain]
    tiles = [(s, seen, _slots(s, heads)) for s, seen in fetched if not s.plain]
    # Scores of plain segments are concatenated before the softmax; those of tiles are combined per batch row after it.
    plain_scores = [segment_scores(q_BHGQD, s, scale, seen) for s, seen in plain]
    scores = [segment_scores(q_BHGQD, s, scale, seen) for s, seen, _ in tiles]
    row_scores = torch.cat(plain_scores, dim=-1) if len(plain_scores) > 1 else plain_scores[0] if plain_scores else None
    top = _max_scores(row_scores, scores, [slot for *_, slot in tiles], q_BHGQD)
    out, mass = q_BHGQD.new_zeros(batch, heads, top.shape[2], dim), torch.zeros_like(top)
    if row_scores is not None:
        weights = row_scores.sub_(top[..., None]).exp_()
        mass = weights.sum(dim=-1)
        parts = weights.split([s.tokens for s, _ in plain], dim=-1)
        for (segment, seen), part in zip(plain, parts, strict=True):
            out = out + _sums(part, segment, seen)
    for (segment, seen, slot), score in zip(tiles, scores, strict=True):
        weights = score.sub_(top.flatten(0, 1)[slot].view(*score.shape[:3], 1)).exp_()
        masses = weights.sum(dim=-1).flatten(0, 1)
        mass = mass.flatten(0, 1).index_add(0, slot, masses).view_as(mass)
        out = out + _weighted(weights, masses, segment, (segment.owner, slot), seen, (batch, heads))
    return out, top, mass


def segment_partial(
    q_BHGQD: torch.Tensor, segment: Segment, scale: float, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over each entry of a segment separately, [E, H, G * Q, D], and the log of its softmax mass, which is
    -inf if no token is visible."""
    scores = segment_scores(q_BHGQD, segment, scale, visible)
    nothing = scores.amax(dim=-1) == torch.finfo(scores.dtype).min
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().masked_fill(nothing[..., None], 0.0)
    entries, heads = scores.shape[:2]
    alone = (torch.arange(entries, device=scores.device), torch.arange(entries * heads, device=scores.device))
    out = _weighted(weights, weights.sum(dim=-1).flatten(0, 1), segment, alone, visible, (entries, heads))
    return out, lse.masked_fill(nothing, -torch.inf)


def segment_scores(
    q_BHGQD: torch.Tensor, segment: Segment, scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of a segment's tokens, [E, H, G * Q, N]; the dtype's minimum for tokens that a query does not see."""
    work = q_BHGQD.dtype
    groups, hidden = q_BHGQD.shape[2:4], torch.finfo(work).min
    # Scaled before a batch row's queries are copied to all its tiles.
    q = q_BHGQD.flatten(2, 3) * scale
    if not segment.each_row:
        q = q[segment.owner] if segment.head is None else q[segment.owner, segment.head][:, None]
    if segment.frame is not None:
        q = segment.frame.unrotate(q)
    if segment.q_map is not None:
        q = mapped(q, segment.q_map)
    scores = products(q, segment.keys)
    if segment.score_map is not None:
        scores = mapped(scores, segment.score_map.transpose(-1, -2))
    bias = segment.score_bias(work)
    if bias is not None:
        scores = scores + bias[:, :, None]
    if segment.mask is not None:
        scores = scores.masked_fill(~segment.mask[:, None, None], hidden)
    if visible is not None:
        scores = scores.unflatten(2, groups).masked_fill(~visible[:, None, None], hidden).flatten(2, 3)
    return scores


def _max_scores(
    row_scores: torch.Tensor | None,
    scores: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    q_BHGQD: torch.Tensor,
) -> torch.Tensor:
    """Maximum score of each query over all segments, [B, H, G * Q]; infinite if it sees no token, which makes all its
    weights 0."""
    hidden = torch.finfo(q_BHGQD.dtype).min
    batch, heads, groups, queries, _ = q_BHGQD.shape
    # The result does not depend on it, so it needs no gradient.
    top = (
        q_BHGQD.new_full((batch, heads, groups * queries), hidden)
        if row_scores is None
        else row_scores.detach().amax(dim=-1)
    )
    for score, slot in zip(scores, slots, strict=True):
        peak = score.detach().amax(dim=-1).flatten(0, 1)
        top = top.flatten(0, 1).scatter_reduce(0, slot[:, None].expand_as(peak), peak, "amax").view_as(top)
    return top.masked_fill(top == hidden, torch.inf)


def _weighted(
    weights: torch.Tensor,
    masses: torch.Tensor,
    segment: Segment,
    whose: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.Tensor:
    """Weighted sum of a segment's values, [B, H, G * Q, D].

    Args:
        weights: [E, H, G * Q, N]; masses: [E * H, G * Q], their sums.
        whose: batch row [E] of each entry, and flat index [E * H] over batch rows and KV heads of each entry's heads.
        visible: see `attend`.
        shape: B and H.
    """
    (batch, heads), (owner, slot) = shape, whose
    if segment.value_map is None:
        parts = _sums(weights, segment, visible).flatten(0, 1)
        out = (
            parts.new_zeros(batch * heads, *parts.shape[1:])
            .index_add(0, slot, parts)
            .view(batch, heads, *parts.shape[1:])
        )
    else:
        absent = None if segment.mask is None else (masses == 0).view(*weights.shape[:3], 1)
        parts = sums(mapped(weights, segment.value_map), segment.values)
        # The values of entries without tokens may be anything.
        out = by_row(parts if absent is None else parts.masked_fill(absent, 0.0), owner, batch)
    if segment.value_mean is not None:
        mass = masses.new_zeros(batch * heads, masses.shape[1]).index_add(0, slot, masses)
        out = out + mass.view(batch, heads, -1, 1) * segment.value_mean.to(out.dtype)[:, None]
    if segment.out_map is None:
        return out
    if segment.head is None:
        return mapped(out, segment.out_map)
    # Entries of single heads share one map.
    return mapped(out.flatten(0, 1)[:, None], segment.out_map).view(batch, heads, *out.shape[2:3], -1)


def _slots(segment: Segment, heads: int) -> torch.Tensor:
    """Flat index over batch rows and KV heads of each entry's heads, [E * H]."""
    if segment.head is not None:
        return segment.owner * heads + segment.head
    return (segment.owner[:, None] * heads + torch.arange(heads, device=segment.owner.device)).flatten()


def products(q_EHRD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Products [E, H, R, M] of q [E, H, R, D] with every stored row [E, H, M, D]."""
    if isinstance(rows, torch.Tensor):
        return _times(q_EHRD, rows.to(q_EHRD.dtype).transpose(-1, -2))
    parts = [_packed_products(q, part) for q, part in _chunks(q_EHRD, rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _packed_products(q_EHRD: torch.Tensor, rows: Packed) -> torch.Tensor:
    if not isinstance(rows, AffineRows):
        return _times(q_EHRD, rows.read(q_EHRD.dtype).transpose(-1, -2))
    scale, midpoint = rows.scale.to(q_EHRD.dtype), rows.midpoint.to(q_EHRD.dtype)
    scaled = q_EHRD * scale
    by_plane = torch.stack([scaled @ plane for plane in rows.planes(q_EHRD.dtype)], dim=-1)
    return by_plane.flatten(3)[..., : rows.shape[2]] + (q_EHRD * midpoint).sum(dim=-1, keepdim=True)


def sums(weights_EHRM: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Sums [E, H, R, D] of the rows [E, H, M, D] with weights [E, H, R, M]."""
    if isinstance(rows, torch.Tensor):
        return _times(weights_EHRM, rows.to(weights_EHRM.dtype))
    parts = [_packed_sums(weights, part) for weights, part in _chunks(weights_EHRM, rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def by_row(x_E: torch.Tensor, owner: torch.Tensor, batch: int) -> torch.Tensor:
    """Sums of x [E, ...] over the entries of each batch row, [B, ...]."""
    # With one batch row, all entries belong to it.
    return x_E.sum(dim=0, keepdim=True) if batch == 1 else x_E.new_zeros(batch, *x_E.shape[1:]).index_add(0, owner, x_E)


def _packed_sums(weights_EHRM: torch.Tensor, rows: Packed) -> torch.Tensor:
    work = weights_EHRM.dtype
    if not isinstance(rows, AffineRows):
        return _times(weights_EHRM, rows.read(work))
    total = torch.zeros_like(weights_EHRM[..., :1])
    for i, plane in enumerate(rows.planes(work)):
        weights = weights_EHRM[..., i :: rows.lanes]
        total = total + weights @ plane[..., : weights.shape[3]].transpose(-1, -2)
    return total * rows.scale.to(work) + weights_EHRM.sum(dim=-1, keepdim=True) * rows.midpoint.to(work)


def _chunks(x_EHRM: torch.Tensor, rows: Packed) -> Iterator[tuple[torch.Tensor, Packed]]:
    """Chunks of entries of both, small enough for the unpacked rows to stay in a CPU's cache until they are used."""
    entries, most = rows.shape[0], max(1, _AT_ONCE // rows.shape[1:].numel())
    if entries <= most:
        yield x_EHRM, rows
        return
    every = torch.arange(entries, device=x_EHRM.device)
    for first in range(0, entries, most):
        yield x_EHRM[first : first + most], rows.select(every[first : first + most])


def _times(x_EHRM: torch.Tensor, rows_ESMN: torch.Tensor) -> torch.Tensor:
    """Product x rows, [E, H, R, N]; rows that neighbouring heads share are read once."""
    heads, head_groups = x_EHRM.shape[1], rows_ESMN.shape[1]
    product: torch.Tensor = x_EHRM.unflatten(1, (head_groups, -1)).flatten(2, 3) @ rows_ESMN
    by_head: torch.Tensor = product.unflatten(2, (heads // head_groups, -1))
    return by_head.flatten(1, 2)


def mapped(x_EHRM: torch.Tensor, map_HMN: torch.Tensor) -> torch.Tensor:
    """Product x map with a map shared by all entries (and by neighbouring heads, if it has fewer heads); a broadcast
    matmul would copy the map for every entry."""
    x_ESGRM = x_EHRM.unflatten(1, (map_HMN.shape[0], -1))
    return torch.einsum("esgrm,smn->esgrn", x_ESGRM, map_HMN.to(x_EHRM.dtype)).flatten(1, 2)


def _sums(weights_EHRM: torch.Tensor, segment: Segment, visible: torch.Tensor | None) -> torch.Tensor:
    """Weighted sums of a segment's values, with one stored row per token.

    Values of tokens that no query sees are set to 0 first, because 0 * NaN is NaN. Codes are never NaN.
    """
    rows = segment.values
    always = not isinstance(rows, torch.Tensor) and isinstance(rows, AffineRows)
    if always or (segment.mask is None and visible is None):
        return sums(weights_EHRM, rows)
    values = read_sets(rows, weights_EHRM.dtype)
    if segment.mask is not None:
        values = values.masked_fill(~segment.mask[:, None, :, None], 0.0)
    if visible is not None:
        values = values.masked_fill(~visible.any(dim=1)[:, None, :, None], 0.0)
    return sums(weights_EHRM, values)
