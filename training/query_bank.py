"""What a compact capsule is trained with: the bank of queries that it matches, and a selector that imitates a slower
choice of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kvcapsule.codec.attention_matching import Reading, targets
from kvcapsule.codec.compact import CompactLayer, Selector
from kvcapsule.kernels.reference import segment_scores
from kvcapsule.segments.segment import Segment

from .harvest import LayerHarvest

_CHUNK = 32
"""Tiles whose choice is made at once."""
_SEEDS = 1_000_003
"""Between the seeds of two rows: more than there are layers."""
_LEAST_SHARE = 1e-4
"""Share of attention below which queries read a tile equally little."""


class QueryBank:
    """A weighted sample, without repetition, of the queries that read one layer's tiles, in the tiles' frames; its size
    is fixed.

    A query is drawn with the square of the share of its attention that goes to the tile, for that is what an error in
    the tile adds to its output's squared error. Every KV head has its own sample, from all query heads that share it.
    Weighted reservoir sampling (Efraimidis and Spirakis, 2006): what is kept are the greatest of random priorities, so
    samples of several ranks can be merged.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        """seed: another one for every layer and rank."""
        self.size, self.seed, self.seen = size, seed, 0
        self.queries: torch.Tensor | None = None
        """[H, Q, D], Q <= size."""
        self.priority: torch.Tensor | None = None
        """[H, Q]."""
        self._random = torch.Generator().manual_seed(seed)

    def add(self, layer: LayerHarvest, numbers: Sequence[int] | None = None) -> None:
        """Offer the queries that read a layer's tiles; each tile is offered those of its own row.

        numbers: of the batch's rows; what is drawn then depends on them and not on the order in which rows come, so
            that several ranks
        draw together what one would.
        """
        heads = layer.keys.shape[1]
        reads = layer.reads[layer.owner][:, None].expand(-1, layer.query.shape[1] // heads, -1)  # [E, G, Q]
        query = layer.query.float()[layer.owner]
        query = query if layer.frame is None else layer.frame.back(query)
        query = query.unflatten(1, (heads, -1)).permute(0, 2, 3, 1, 4)[reads].transpose(0, 1)  # [H, n, D]
        share = _shares(layer).permute(0, 2, 3, 1)[reads].transpose(0, 1)
        # In fp64 and by its log: with shares this uneven, powers of a random number would all round to 0.
        drawn = self._drawn(layer, reads, numbers).to(share.device)
        self.merge(query, drawn.log() / share.double().clamp_min(_LEAST_SHARE).square())
        self.seen += query.shape[1]

    def _drawn(self, layer: LayerHarvest, reads_EGQ: torch.Tensor, numbers: Sequence[int] | None) -> torch.Tensor:
        """A random number for each query of each tile, in fp64."""
        counts = reads_EGQ.sum((1, 2)).tolist()
        if numbers is None:
            return torch.rand(sum(counts), generator=self._random, dtype=torch.float64)
        seen: dict[int, torch.Generator] = {}
        for row in layer.owner.tolist():
            seen.setdefault(row, torch.Generator().manual_seed(self.seed + _SEEDS * numbers[row]))
        each = zip(counts, layer.owner.tolist(), strict=True)
        return torch.cat([torch.rand(count, generator=seen[row], dtype=torch.float64) for count, row in each])

    def merge(self, queries: torch.Tensor, priority: torch.Tensor) -> None:
        """Take in queries [H, n, D] with their priorities [H, n], those of another rank's bank for one."""
        if self.queries is not None and self.priority is not None:
            queries, priority = torch.cat([self.queries, queries], dim=1), torch.cat([self.priority, priority], dim=1)
        best = priority.argsort(dim=1, descending=True, stable=True)[:, : self.size]
        self.queries = queries.gather(1, best[..., None].expand(-1, -1, queries.shape[2]))
        self.priority = priority.gather(1, best)

    def gather(self) -> None:
        """Join the samples of all ranks."""
        if (
            not (torch.distributed.is_available() and torch.distributed.is_initialized())
            or torch.distributed.get_world_size() == 1
        ):
            return
        assert self.queries is not None and self.priority is not None
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (self.queries.cpu(), self.priority.cpu()))
        device = self.queries.device
        for rank, (queries, priority) in enumerate(found):
            if rank != torch.distributed.get_rank():
                self.merge(queries.to(device), priority.to(device))

    @property
    def found(self) -> int:
        """Queries of each head so far, at most as many as are wanted."""
        return 0 if self.queries is None else self.queries.shape[1]

    def bank(self) -> torch.Tensor:
        """[H, size, D].

        Raises:
            ValueError: if fewer queries were offered.
        """
        if self.queries is None or self.found < self.size:
            raise ValueError(
                f"a bank of {self.size} queries cannot be filled from the {self.found} that read the tiles: "
                "collect from more batches, or ask for a smaller bank."
            )
        return self.queries


def _shares(layer: LayerHarvest) -> torch.Tensor:
    """[E, H, G, Q]: the share of each query's attention that goes to each tile."""
    batch, query_heads, n_queries, dim = layer.query.shape
    heads = layer.keys.shape[1]
    query = layer.query.float().view(batch, heads, query_heads // heads, n_queries, dim)
    groups = query.shape[2:4]
    of_tiles = Segment(layer.keys, layer.values, layer.owner, frame=layer.frame)
    tiles = segment_scores(query, of_tiles, layer.scale).logsumexp(-1).unflatten(2, groups)
    rest = segment_scores(query, layer.rest, layer.scale, layer.visible).logsumexp(-1).unflatten(2, groups)
    lse, owner = torch.cat([tiles, rest]), torch.cat([layer.owner, layer.rest.owner])
    index = owner.view(-1, 1, 1, 1).expand_as(lse)
    top = lse.new_full((batch, *lse.shape[1:]), -torch.inf).scatter_reduce(0, index, lse, "amax")
    whole = torch.zeros_like(top).index_add(0, owner, (lse - top[owner]).exp())
    return (tiles - top[layer.owner]).exp() / whole[layer.owner]


def greedy_choice(reading: Reading, v_EHTD: torch.Tensor, count: int) -> torch.Tensor:
    """The teacher: one token after the other, always the one that adds most to what is explained of the tile's output
    and mass.

    Orthogonal matching pursuit with the paper's mass and the output as targets; one step for each token kept, on all
    tiles and heads at once, T (D + M) multiplications a step. Returns [E, H, count] in rising order.
    """
    gram, target, _ = targets(reading, v_EHTD)
    left = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-6 * left.amax(-1, keepdim=True)
    free = torch.ones_like(left, dtype=torch.bool)
    columns = gram.new_zeros(*left.shape, 0)
    picks: list[torch.Tensor] = []
    for _ in range(count):
        gain = (target.square().sum(-1) / left.clamp_min(floor)).masked_fill(~free, -1.0)
        pick = gain.argmax(-1)[..., None]
        picks.append(pick)
        free = free.scatter(-1, pick, False)
        before = columns.gather(2, pick[..., None].expand(-1, -1, -1, columns.shape[-1]))
        column = gram.gather(3, pick[:, :, None].expand(-1, -1, gram.shape[2], -1))[..., 0] - (columns * before).sum(-1)
        column = column / left.gather(-1, pick).clamp_min(floor).sqrt()
        explained = (
            target.gather(2, pick[..., None].expand(-1, -1, -1, target.shape[-1]))
            / left.gather(-1, pick).clamp_min(floor).sqrt()[..., None]
        )
        target = target - column[..., None] * explained
        left = (left - column.square()).clamp_min(0.0)
        columns = torch.cat([columns, column[..., None]], dim=-1)
    return torch.cat(picks, dim=-1).sort(-1).values


def chosen_by_teacher(codec: CompactLayer, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> torch.Tensor:
    """[E, H, T] bool: the tokens that the greedy choice keeps."""
    kept = [
        greedy_choice(codec.read(k), v, codec.stored)
        for k, v in zip(k_EHTD.split(_CHUNK), v_EHTD.split(_CHUNK), strict=True)
    ]
    marked = torch.zeros(k_EHTD.shape[:3], dtype=torch.bool, device=k_EHTD.device)
    return marked.scatter(-1, torch.cat(kept), True)


def imitation_loss(
    selector: Selector, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, chosen_EHT: torch.Tensor
) -> torch.Tensor:
    """Binary cross-entropy of the selector's scores to the teacher's choice."""
    scores = selector(k_EHTD, v_EHTD)
    return F.binary_cross_entropy_with_logits(scores, chosen_EHT.to(scores.dtype))


def begin(selector: Selector, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, seed: int = 0) -> None:
    """Begin anew: take the selector's mean and spread from tiles, and draw its weights."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.cat([k_EHTD, v_EHTD], dim=-1).float()
    with torch.no_grad():
        selector.mean.copy_(tokens.mean((0, 2)))
        selector.spread.copy_(tokens.std((0, 2)).clamp_min(1e-6))
        for weights in (selector.inner, selector.outer):
            weights.copy_(torch.randn(weights.shape, generator=random) * weights.shape[1] ** -0.5)
        for weights in (selector.place, selector.place_bias):
            weights.zero_()
