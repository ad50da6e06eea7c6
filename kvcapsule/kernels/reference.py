"""Attention over a list of segments in plain PyTorch: the ground truth, and what runs on the CPU. fp32 throughout (fp64
for fp64 queries).

Nothing here expands keys or values along the token axis: only scores and weights (one number a token and query) have
the logical length, but for packed rows, whose `read` says itself what it builds. Maps that a layer's tiles share are
applied to all tiles at once, and those behind the values to a batch row's sum over its tiles. Nothing waits for the
device or depends on what tensors hold, so a step can be compiled or captured.
"""

from collections.abc import Iterator, Sequence

import torch

from ..segments.segment import Packed, Rows, Segment, Stepped, read_sets

_AT_ONCE = 2**21
"""Numbers that packed rows are read to at once, where they are of many entries."""


def attend(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention of queries over all tokens of their row's segments jointly.

    Args:
        query: [B, H * G, Q, D], rotated as the model does.
        segments: one segment must hold all KV heads (the tail does). A query that sees no token at all, as padding may,
            gets 0.
        scale: factor of the scores.
        visible: [E, Q, N] bool of the LAST segment (the tail): which of its tokens each query sees. None: all.

    Returns: [B, H * G, Q, D] in the query's dtype.
    """
    out, _, mass = summed(query, segments, scale, visible)
    out = out / mass.clamp_min(torch.finfo(out.dtype).tiny)[..., None]
    return out.view(query.shape).to(query.dtype)


def summed(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention divides: sums of the values [B, H, G * Q, D], each query's greatest score and the sum of its
    weights [B, H, G * Q].

    A token's weight is e^(score - greatest score). The greatest score of a query that sees no token is infinite.
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
    # Segments without a token add nothing, and have no greatest score.
    fetched = [(s, seen) for s, seen in fetched if s.tokens and len(s.owner)]
    plain = [(s, seen) for s, seen in fetched if s.plain]
    tiles = [(s, seen, _slots(s, heads)) for s, seen in fetched if not s.plain]
    # Runs of tokens that every row has one of are joined before the softmax, tiles behind it.
    runs = [segment_scores(q_BHGQD, s, scale, seen) for s, seen in plain]
    scores = [segment_scores(q_BHGQD, s, scale, seen) for s, seen, _ in tiles]
    joined = torch.cat(runs, dim=-1) if len(runs) > 1 else runs[0] if runs else None
    top = _greatest(joined, scores, [slot for *_, slot in tiles], q_BHGQD)
    out, mass = q_BHGQD.new_zeros(batch, heads, top.shape[2], dim), torch.zeros_like(top)
    if joined is not None:
        weights = joined.sub_(top[..., None]).exp_()
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
    """Attention over each entry of a segment alone, [E, H, G * Q, D], and the log of its softmax mass: -inf where no
    token is visible."""
    scores = segment_scores(q_BHGQD, segment, scale, visible)
    nothing = scores.amax(dim=-1) == torch.finfo(scores.dtype).min
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().masked_fill(nothing[..., None], 0.0)
    entries, heads = scores.shape[:2]
    alone = (torch.arange(entries, device=scores.device), torch.arange(entries * heads, device=scores.device))
    out = _weighted(weights, weights.sum(dim=-1).flatten(0, 1), segment, alone, visible, (entries, heads))
    return out, lse.masked_fill(nothing, -torch.inf)


def segment_scores(
    q_BHGQD: torch.Tensor,
    segment: Segment,
    scale: float,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of a segment's tokens, [E, H, G * Q, N]; those of tokens that a query does not see are the least number of
    the dtype."""
    work = q_BHGQD.dtype
    groups, hidden = q_BHGQD.shape[2:4], torch.finfo(work).min
    # Scaled before a row's queries become those of all its tiles.
    q = q_BHGQD.flatten(2, 3) * scale
    if not segment.each_row:
        q = q[segment.owner] if segment.head is None else q[segment.owner, segment.head][:, None]
    if segment.frame is not None:
        q = segment.frame.back(q)
    if segment.q_map is not None:
        q = mapped(q, segment.q_map)
    scores = products(q, segment.keys)
    if segment.score_map is not None:
        scores = mapped(scores, segment.score_map.transpose(-1, -2))
    if segment.bias is not None:
        scores = scores + segment.bias.to(work)[:, :, None]
    if segment.mask is not None:
        scores = scores.masked_fill(~segment.mask[:, None, None], hidden)
    if visible is not None:
        scores = scores.unflatten(2, groups).masked_fill(~visible[:, None, None], hidden).flatten(2, 3)
    return scores


def _greatest(
    joined: torch.Tensor | None, scores: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], q_BHGQD: torch.Tensor
) -> torch.Tensor:
    """[B, H, G * Q]: each query's greatest score over all segments; infinite where it sees no token, so that nothing
    weighs anything."""
    hidden = torch.finfo(q_BHGQD.dtype).min
    batch, heads, groups, queries, _ = q_BHGQD.shape
    # What it is does not matter to the result, so no gradient goes through it.
    top = q_BHGQD.new_full((batch, heads, groups * queries), hidden) if joined is None else joined.detach().amax(dim=-1)
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
    """[B, H, G * Q, D]: the sum of a segment's values, each token's with its weight [E, H, G * Q, N]; masses [E * H, G
    * Q] their sums.

    whose: the batch row of each entry, [E], and row and KV head, counted through, of each entry's heads, [E * H].
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
        # An entry that has no token at all may hold anything.
        out = by_row(parts if absent is None else parts.masked_fill(absent, 0.0), owner, batch)
    if segment.value_mean is not None:
        mass = masses.new_zeros(batch * heads, masses.shape[1]).index_add(0, slot, masses)
        out = out + mass.view(batch, heads, -1, 1) * segment.value_mean.to(out.dtype)[:, None]
    if segment.out_map is None:
        return out
    if segment.head is None:
        return mapped(out, segment.out_map)
    # Single heads have one map between them.
    return mapped(out.flatten(0, 1)[:, None], segment.out_map).view(batch, heads, *out.shape[2:3], -1)


def _slots(segment: Segment, heads: int) -> torch.Tensor:
    """[E * H]: the batch row and KV head, counted through, that each entry's head belongs to."""
    if segment.head is not None:
        return segment.owner * heads + segment.head
    return (segment.owner[:, None] * heads + torch.arange(heads, device=segment.owner.device)).flatten()


def products(q_EHRD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """q [E, H, R, D] with every stored row [E, H, M, D]: [E, H, R, M]."""
    if isinstance(rows, torch.Tensor):
        return _times(q_EHRD, rows.to(q_EHRD.dtype).transpose(-1, -2))
    parts = [_packed_products(q, part) for q, part in _chunks(q_EHRD, rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _packed_products(q_EHRD: torch.Tensor, rows: Packed) -> torch.Tensor:
    if not isinstance(rows, Stepped):
        return _times(q_EHRD, rows.read(q_EHRD.dtype).transpose(-1, -2))
    step, middle = rows.step.to(q_EHRD.dtype), rows.middle.to(q_EHRD.dtype)
    turned = q_EHRD * step
    by_plane = torch.stack([turned @ plane for plane in rows.planes(q_EHRD.dtype)], dim=-1)
    return by_plane.flatten(3)[..., : rows.shape[2]] + (q_EHRD * middle).sum(dim=-1, keepdim=True)


def sums(weights_EHRM: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Sums of the rows [E, H, M, D] with weights [E, H, R, M]: [E, H, R, D]."""
    if isinstance(rows, torch.Tensor):
        return _times(weights_EHRM, rows.to(weights_EHRM.dtype))
    parts = [_packed_sums(weights, part) for weights, part in _chunks(weights_EHRM, rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def by_row(x_E: torch.Tensor, owner: torch.Tensor, batch: int) -> torch.Tensor:
    """[B, ...]: the sums of x [E, ...] over each batch row's entries."""
    # Of one row all entries are.
    return x_E.sum(dim=0, keepdim=True) if batch == 1 else x_E.new_zeros(batch, *x_E.shape[1:]).index_add(0, owner, x_E)


def _packed_sums(weights_EHRM: torch.Tensor, rows: Packed) -> torch.Tensor:
    work = weights_EHRM.dtype
    if not isinstance(rows, Stepped):
        return _times(weights_EHRM, rows.read(work))
    found = torch.zeros_like(weights_EHRM[..., :1])
    for i, plane in enumerate(rows.planes(work)):
        own = weights_EHRM[..., i :: rows.lanes]
        found = found + own @ plane[..., : own.shape[3]].transpose(-1, -2)
    return found * rows.step.to(work) + weights_EHRM.sum(dim=-1, keepdim=True) * rows.middle.to(work)


def _chunks(x_EHRM: torch.Tensor, rows: Packed) -> Iterator[tuple[torch.Tensor, Packed]]:
    """Entries of both, so many at a time that the numbers that are read are still in a CPU's cache when they are
    used."""
    entries, most = rows.shape[0], max(1, _AT_ONCE // rows.shape[1:].numel())
    if entries <= most:
        yield x_EHRM, rows
        return
    every = torch.arange(entries, device=x_EHRM.device)
    for first in range(0, entries, most):
        yield x_EHRM[first : first + most], rows.select(every[first : first + most])


def _times(x_EHRM: torch.Tensor, rows_ESMN: torch.Tensor) -> torch.Tensor:
    """x rows, [E, H, R, N], where neighbouring heads may have rows in common: these are then read once."""
    heads, sets = x_EHRM.shape[1], rows_ESMN.shape[1]
    product: torch.Tensor = x_EHRM.unflatten(1, (sets, -1)).flatten(2, 3) @ rows_ESMN
    by_head: torch.Tensor = product.unflatten(2, (heads // sets, -1))
    return by_head.flatten(1, 2)


def mapped(x_EHRM: torch.Tensor, map_HMN: torch.Tensor) -> torch.Tensor:
    """x map, where all entries share the map (and neighbouring heads, where it has fewer): a broadcast product would
    copy it for each."""
    x_ESGRM = x_EHRM.unflatten(1, (map_HMN.shape[0], -1))
    return torch.einsum("esgrm,smn->esgrn", x_ESGRM, map_HMN.to(x_EHRM.dtype)).flatten(1, 2)


def _sums(weights_EHRM: torch.Tensor, segment: Segment, visible: torch.Tensor | None) -> torch.Tensor:
    """Of a segment's stored values that are one for each token.

    Values are zero where no query sees the token: a weight of 0 would not silence what is not a number there. Codes are
    always numbers.
    """
    rows = segment.values
    always = not isinstance(rows, torch.Tensor) and isinstance(rows, Stepped)
    if always or (segment.mask is None and visible is None):
        return sums(weights_EHRM, rows)
    values = read_sets(rows, weights_EHRM.dtype)
    if segment.mask is not None:
        values = values.masked_fill(~segment.mask[:, None, :, None], 0.0)
    if visible is not None:
        values = values.masked_fill(~visible.any(dim=1)[:, None, :, None], 0.0)
    return sums(weights_EHRM, values)
