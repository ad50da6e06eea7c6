"""PooledSegment: a segment whose entries lie anywhere in a pool that outlives them.

An engine that serves many requests holds them so: capsules in slots, raw rows in the blocks of a paged cache. A step of
all requests is then one segment, and nothing is copied for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch

from .segment import Segment


@dataclass(frozen=True)
class PooledSegment(Segment):
    """E entries, of which entry i is entry place[i] of a pool of P; several may be the same one.

    keys, values, bias and frame are those of the pool, [P, ...]; owner, place and counts are those of the entries, [E].
    """

    place: torch.Tensor | None = None
    """[E] int64."""
    counts: torch.Tensor | None = None
    """[E] int64: tokens of each entry that are written, where blocks fill up; others may hold anything. None: all."""

    @classmethod
    def of(cls, pool: Segment, owner: torch.Tensor, place: torch.Tensor, counts: torch.Tensor | None = None) -> Self:
        """Entries `place` of a pool, owned by the batch rows `owner`."""
        return cls(
            **{f.name: getattr(pool, f.name) for f in fields(Segment)} | {"owner": owner, "each_row": False},
            place=place,
            counts=counts,
        )

    def __post_init__(self) -> None:
        if self.place is None or self.place.shape != self.owner.shape:
            raise ValueError(f"{len(self.owner)} entries of a pool need as many places.")
        if self.counts is not None and (
            self.counts.shape != self.owner.shape or self.score_map is not None or self.value_map is not None
        ):
            raise ValueError("counts are one number an entry, and for entries without maps along the tokens.")
        if self.mask is not None or self.head is not None:
            raise ValueError("a pool's entries hold all KV heads and are not masked: pass counts.")

    def for_query(self, q_BHGQD: torch.Tensor, scale: float) -> Segment:
        return self.gathered()

    def entry_tensors(self) -> Iterator[torch.Tensor]:
        yield from super().entry_tensors()
        yield from (t for t in (self.place, self.counts) if t is not None)

    def gathered(self) -> Segment:
        """A copy without a pool. What is not written is masked, and repeats the entry's first token."""
        place = self.place
        assert place is not None
        pool = Segment(
            **{f.name: getattr(self, f.name) for f in fields(Segment)}
            | {"owner": torch.arange(len(self.keys_pool()), device=place.device)}
        )
        segment = replace(pool.select(place), owner=self.owner)
        if self.counts is None:
            return segment
        written = torch.arange(self.tokens, device=place.device) < self.counts[:, None]
        raw_keys, raw_values = segment.keys, segment.values
        assert isinstance(raw_keys, torch.Tensor) and isinstance(raw_values, torch.Tensor)
        keys, values = (torch.where(written[:, None, :, None], x, x[:, :, :1]) for x in (raw_keys, raw_values))
        return replace(segment, keys=keys, values=values, mask=written)

    def keys_pool(self) -> torch.Tensor:
        """[P]: a tensor as long as the pool."""
        return self.keys if isinstance(self.keys, torch.Tensor) else self.keys.tensors()[0]
