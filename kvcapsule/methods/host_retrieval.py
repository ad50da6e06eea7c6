"""Host retrieval, for HybridKV: segments whose rows lie in the memory of the host; each decode step loads the chunks
(runs of tokens) that match its query best.

Shapes: E entries, S slots of the host's store, C chunks of T tokens, K chunks that are loaded, D head dim; n tokens of
an entry.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..segments.memo import Memo
from ..segments.segment import Segment
from .layer_prefill import LayerPrefill


class HostRows(NamedTuple):
    """Keys and values of single KV heads in the host's memory, pinned where they come from a CUDA device; chunk by
    chunk."""

    keys: torch.Tensor
    """[S, C, T, D]; what fills up the last chunk is 0."""
    values: torch.Tensor
    """As keys."""

    @classmethod
    def store(cls, keys: torch.Tensor, values: torch.Tensor, chunk: int) -> "HostRows":
        """Copy rows [S, n, D] to the host."""
        return cls(_to_host(keys, chunk), _to_host(values, chunk))

    def take(self, slots: torch.Tensor) -> "HostRows":
        """A store of the slots `slots` alone."""
        return HostRows(*(_gathered(rows, slots) for rows in self))

    def load(self, slots: torch.Tensor, chunks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy chunks [E, K] of the slots [E] (both on the host) to keys and values on the device, of E * K * T * D
        elements each."""
        index = (slots[:, None] * self.keys.shape[1] + chunks).flatten()
        for rows, out in ((self.keys, keys), (self.values, values)):
            out.copy_(_gathered(rows.flatten(0, 1), index).view_as(out), non_blocking=True)


def _to_host(rows_SnD: torch.Tensor, chunk: int) -> torch.Tensor:
    slots, tokens, dim = rows_SnD.shape
    shape = (slots, -(-tokens // chunk) * chunk, dim)
    host = torch.zeros(shape, dtype=rows_SnD.dtype, pin_memory=rows_SnD.is_cuda)
    host[:, :tokens].copy_(rows_SnD)
    return host.view(slots, -1, chunk, dim)


def _gathered(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(index), *rows.shape[1:], dtype=rows.dtype, pin_memory=rows.is_pinned())
    return torch.index_select(rows, 0, index, out=out)


def _means(keys_EnD: torch.Tensor, chunk: int) -> torch.Tensor:
    """[E, C, D]; the last chunk's is over the tokens that it has."""
    tokens = keys_EnD.shape[1]
    work = keys_EnD.to(torch.promote_types(keys_EnD.dtype, torch.float32))
    sums = F.pad(work, (0, 0, 0, -tokens % chunk)).unflatten(1, (-1, chunk)).sum(dim=2)
    counts = (tokens - torch.arange(0, tokens, chunk, device=sums.device)).clamp_max(chunk)
    means: torch.Tensor = sums / counts[:, None]
    return means.to(keys_EnD.dtype)


@dataclass(frozen=True, kw_only=True)
class Retrieved(Segment):
    """E entries of single KV heads: all their rows on the host, the mean key of each chunk and a buffer of K chunks on
    the device.

    For one new token (G queries of a KV head's query heads):

        score of chunk j = mean over the G queries q of softmax_j(q mean_j * scale)

    the K chunks with the highest scores are copied into the buffer, and attention is over these alone, exact among
    them. They are chosen and copied anew at each step, and nothing else is done meanwhile. The softmax gives each query
    head the same say, whatever the size of its scores.

    Several new tokens at once (a later turn's prompt) read all rows, which are then on the device, of one layer at a
    time: each of them would else need a choice and a buffer of its own. It is the one place where attention reads what
    `materialize` builds.

    Entries are `keys` and `values` [E, 1, K * T, D], the buffer, which holds what the last query asked for. In
    `select`, entries that come from one share its slot of the host's store. Where the model runs on the CPU, device and
    host are the same memory: bytes are still told apart by what is kept for retrieval (`host_tensors`) and what
    attention reads or ranks by (`entry_tensors`), but nothing is saved.
    """

    means: torch.Tensor
    """[E, C, D] in the dtype of the keys."""
    host: HostRows
    slot: torch.Tensor
    """[E] int64 on the host: where each entry's rows are in the store."""
    length: int
    """n: tokens of an entry."""

    @classmethod
    def of(cls, prefill: LayerPrefill, rows: torch.Tensor, heads: torch.Tensor, chunk: int, count: int) -> "Retrieved":
        """Store all valid tokens of KV heads `heads` [E] of rows `rows` [E], which have equally many, in chunks from
        the first on.

        Args:
            prefill: of the layer.
            rows: batch row of each entry.
            heads: KV head of each entry.
            chunk: T.
            count: K, at least 1; no more chunks are loaded than there are.

        Raises:
            ValueError: if the rows are not of one length: the caller groups them.
        """
        lengths = prefill.valid[rows].sum(dim=1)
        length = int(lengths[0])
        if bool((lengths != length).any()):
            raise ValueError(f"retrieved entries are of rows of one length; these have {lengths.tolist()} tokens.")
        place = torch.sort((~prefill.valid[rows]).to(torch.int8), dim=1, stable=True).indices[:, :length]
        keys, values = (x[rows[:, None], heads[:, None], place] for x in (prefill.keys, prefill.values))
        means = _means(keys, chunk)
        buffer = (len(rows), 1, min(count, means.shape[1]) * chunk, keys.shape[2])
        return cls(
            keys.new_empty(buffer),
            values.new_empty(*buffer[:3], values.shape[2]),
            rows,
            head=heads,
            means=means,
            host=HostRows.store(keys, values, chunk),
            slot=torch.arange(len(rows)),
            length=length,
        )

    @property
    def tokens(self) -> int:
        """n: tokens that an entry stands for; its buffer holds fewer."""
        return self.length

    def for_query(self, q_BHGQD: torch.Tensor, scale: float) -> Segment:
        """The chunks that these queries ask for; all where there are several new tokens. The buffer is overwritten at
        the next call."""
        if q_BHGQD.shape[3] > 1:
            return Segment(*self.materialize(self.means.dtype), self.owner, head=self.head)
        assert isinstance(self.keys, torch.Tensor) and isinstance(self.values, torch.Tensor)
        chosen = self.chosen(q_BHGQD, scale)
        self.host.load(self.slot, chosen.cpu(), self.keys, self.values)
        mask = None
        chunk = self.host.keys.shape[2]
        if self.length % chunk:
            positions = chosen[..., None] * chunk + torch.arange(chunk, device=chosen.device)
            mask = positions.flatten(1) < self.length
        return Segment(self.keys, self.values, self.owner, mask=mask, head=self.head)

    def chosen(self, q_BHGQD: torch.Tensor, scale: float) -> torch.Tensor:
        """[E, K]: the chunks with the highest scores, in their order in the prompt."""
        query = q_BHGQD[self.owner, self.head].flatten(1, 2)
        scores = ((query * scale) @ self.means.to(query.dtype).transpose(1, 2)).softmax(dim=-1).mean(dim=1)
        return scores.topk(self.keys.shape[2] // self.host.keys.shape[2], dim=-1).indices.sort(dim=-1).values

    def select(self, rows: torch.Tensor, memo: Memo | None = None) -> "Retrieved":
        match = self.owner[None, :] == rows.to(self.owner.device)[:, None]
        owner, index = (t.contiguous() for t in match.nonzero(as_tuple=True))
        used, slot = self.slot[index.cpu()].unique(return_inverse=True)
        assert self.head is not None and isinstance(self.keys, torch.Tensor) and isinstance(self.values, torch.Tensor)
        return replace(
            self,
            keys=self.keys.new_empty(len(index), *self.keys.shape[1:]),
            values=self.values.new_empty(len(index), *self.values.shape[1:]),
            owner=owner,
            head=self.head[index],
            means=self.means[index],
            host=self.host if len(used) == len(self.host.keys) else self.host.take(used),
            slot=slot,
        )

    def entry_tensors(self) -> Iterator[torch.Tensor]:
        """The buffer, the chunks' means, and which row and head each entry is of."""
        yield from super().entry_tensors()
        yield self.means

    def host_tensors(self) -> Iterator[torch.Tensor]:
        yield from (*self.host, self.slot)

    def materialize(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows, [E, 1, n, D] each, on the device."""
        chunks = torch.arange(self.means.shape[1]).expand(len(self.slot), -1)
        rows = self.means.shape[1] * self.host.keys.shape[2]
        keys, values = (x.new_empty(len(self.slot), 1, rows, x.shape[3], device=self.means.device) for x in self.host)
        self.host.load(self.slot, chunks, keys, values)
        return keys[:, :, : self.length].to(dtype), values[:, :, : self.length].to(dtype)
