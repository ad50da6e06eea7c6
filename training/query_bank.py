"""A query bank: a weighted sample of the training queries that read one layer's tiles."""

from collections.abc import Sequence

import torch

from kvcapsule.errors import ConfigError
from kvcapsule.kernels.reference import segment_scores
from kvcapsule.segments.segment import Segment

from . import processes
from .harvest import LayerHarvest

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
        """seed: another one for every layer."""
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
        query = query if layer.frame is None else layer.frame.unrotate(query)
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
        rows = zip(counts, layer.owner.tolist(), strict=True)
        return torch.cat([torch.rand(count, generator=seen[row], dtype=torch.float64) for count, row in rows])

    def merge(self, queries: torch.Tensor, priority: torch.Tensor) -> None:
        """Take in queries [H, n, D] with their priorities [H, n], those of another rank's bank for one."""
        if self.queries is not None and self.priority is not None:
            queries, priority = torch.cat([self.queries, queries], dim=1), torch.cat([self.priority, priority], dim=1)
        best = priority.argsort(dim=1, descending=True, stable=True)[:, : self.size]
        self.queries = queries.gather(1, best[..., None].expand(-1, -1, queries.shape[2]))
        self.priority = priority.gather(1, best)

    def gather(self) -> None:
        """Join the samples of all ranks."""
        if processes.count() == 1:
            return
        assert self.queries is not None and self.priority is not None
        samples = zip(processes.gathered(self.queries), processes.gathered(self.priority), strict=True)
        self.queries = self.priority = None
        for queries, priority in samples:
            self.merge(queries, priority)

    @property
    def available(self) -> int:
        """Queries of each head so far, at most as many as are wanted."""
        return 0 if self.queries is None else self.queries.shape[1]

    def bank(self) -> torch.Tensor:
        """[H, size, D].

        Raises:
            ConfigError: if fewer queries were offered.
        """
        if self.queries is None or self.available < self.size:
            raise ConfigError(
                f"a bank of {self.size} queries cannot be filled from the {self.available} that read the tiles: "
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
    total = torch.zeros_like(top).index_add(0, owner, (lse - top[owner]).exp())
    shares: torch.Tensor = (tiles - top[layer.owner]).exp() / total[layer.owner]
    return shares
