"""Segment: one stored piece of a layer's KV cache, in the one form that attention reads (docs/architecture.md).

Shape suffixes, here and in other modules: B batch rows, E entries (pieces of equal shape; each belongs to a batch row),
H KV heads, S groups of neighbouring KV heads, G query heads per KV head, Q queries, N logical tokens of an entry,
M stored rows, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch

from .map_products import times_map
from .memo import Memo
from .packed_rows import Rows, read_rows, stored_tensors
from .rotary_frame import Frame

BIAS_UNIT = 1 / 16
"""What 1 stands for in a bias of int8, in nats: the masses of rows are then right to 3 %, from e^-8 to e^7.9."""


@dataclass(frozen=True)
class Segment:
    """E entries of N logical tokens each, for the KV heads of one layer.

    The output for a query q of the batch row that owns an entry:

        q'  = rotate(q, -frame);  z = (q' q_map) keys^T * scale;  s = z score_map^T + bias
        p   = softmax of s over all segments of the row
        out = ((p value_map) values + sum(p) value_mean) out_map
    """

    keys: Rows
    """[E, H, M, Dk]."""
    values: Rows
    """[E, H, M', Dv]."""
    owner: torch.Tensor
    """[E] int64: batch row of each entry."""
    score_map: torch.Tensor | None = None
    """[H or S, N, M]: maps scores of the M stored rows to scores of the N tokens; a parameter, shared by all entries.
    None: N = M. With S < H (S divides H) each of its matrices serves H / S neighbouring heads.
    """
    value_map: torch.Tensor | None = None
    """[H or S, N, M']: maps probabilities of the N tokens to weights of the M' stored rows; shared. None: N = M'."""
    value_mean: torch.Tensor | None = None
    """[H, Dv]: added to the value of every token; shared."""
    q_map: torch.Tensor | None = None
    """[H, D, Dk]: maps queries to the channels of the stored keys; shared."""
    out_map: torch.Tensor | None = None
    """[H, Dv, D]: maps the channels of the stored values to the output; shared."""
    bias: torch.Tensor | None = None
    """[E, H, N]: added to the scores (log of the softmax mass that a row represents); as int8 in units of BIAS_UNIT."""
    mask: torch.Tensor | None = None
    """[E, N] bool: False at padding (entries of uneven length). None: no padding."""
    frame: Frame | None = None
    """The tiles' rotary frames, if the keys are stored in the canonical frame."""
    head: torch.Tensor | None = None
    """[E] int64: KV head of each entry, where heads store different numbers of tokens; H is then 1. None: an entry
    holds all heads."""
    each_row: bool = False
    """Whether entry i belongs to batch row i, one entry per row. A field, because reading `owner` would wait for the
    device."""

    tag: str | int | None = None
    """A method's mark on its own segments, to know them again during decoding; attention does not read it."""

    def __post_init__(self) -> None:
        entries, heads = self.keys.shape[:2]
        n_keys = self.keys.shape[2] if self.score_map is None else self.score_map.shape[1]
        n_values = self.values.shape[2] if self.value_map is None else self.value_map.shape[1]
        if self.values.shape[:2] != self.keys.shape[:2] or n_keys != n_values or self.owner.shape != (entries,):
            raise ValueError(
                f"segment of keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} with maps to {n_keys}"
                f" and {n_values} tokens and {tuple(self.owner.shape)} owners: entries, KV heads and logical tokens"
                " must agree."
            )
        for name, map_, rows in (("score_map", self.score_map, self.keys), ("value_map", self.value_map, self.values)):
            if map_ is not None and (heads % map_.shape[0] or map_.shape[2] != rows.shape[2]):
                raise ValueError(
                    f"{name} {tuple(map_.shape)} does not map {heads} heads of {rows.shape[2]} stored rows."
                )
        cos = None if self.frame is None else self.frame.cos
        for name, tensor, leading in (
            ("value_mean", self.value_mean, (heads, self.values.shape[3])),
            ("q_map", self.q_map, (heads,)),
            ("out_map", self.out_map, (heads, self.values.shape[3])),
            ("bias", self.bias, (entries, heads, n_keys)),
            ("mask", self.mask, (entries, n_keys)),
            ("frame", cos, (entries,)),
            ("head", self.head, (entries,)),
        ):
            if tensor is not None and tensor.shape[: len(leading)] != leading:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} does not fit a segment that asks for {leading} in its first"
                    " dimensions."
                )
        if self.q_map is not None and self.q_map.shape[2] != self.keys.shape[3]:
            raise ValueError(
                f"q_map {tuple(self.q_map.shape)} does not map queries to keys of {self.keys.shape[3]} channels."
            )

        if self.head is not None and (
            heads != 1 or any(m is not None for m in (self.score_map, self.value_map, self.value_mean))
        ):
            raise ValueError(
                f"entries of single KV heads hold 1 head and no maps along the tokens; these hold {heads}."
            )

    def for_query(self, q_BHGQD: torch.Tensor, scale: float) -> "Segment":
        """The segment that these queries attend to: itself, unless a subclass retrieves rows by query."""
        return self

    @property
    def plain(self) -> bool:
        """Whether every batch row has one entry whose rows need no maps and no frame."""
        extra = (self.score_map, self.value_map, self.value_mean, self.q_map, self.out_map, self.frame)
        return self.each_row and all(x is None for x in extra)

    def score_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[E, H, N] as numbers to add to the scores."""
        if self.bias is None or self.bias.dtype != torch.int8:
            return None if self.bias is None else self.bias.to(dtype)
        return self.bias.to(dtype) * BIAS_UNIT

    @property
    def tokens(self) -> int:
        """N: logical tokens of an entry, padding included."""
        return int(self.keys.shape[2] if self.score_map is None else self.score_map.shape[1])

    def select(self, rows: torch.Tensor, memo: Memo | None = None) -> "Segment":
        """The segment of a batch whose row i is row rows[i] of this one (beam search; repeated or selected rows).

        memo: passed to the segments of all layers, it keeps tensors that they share in one place.
        """
        memo = Memo() if memo is None else memo
        owner, index = memo.get_or_make(self.owner, lambda: _owner_and_index(self.owner, rows.to(self.owner.device)))
        return self.entries(index, owner, memo)

    def entries(self, index: torch.Tensor, owner: torch.Tensor, memo: Memo) -> "Segment":
        """The entries `index` [n], now of the batch rows `owner` [n]; memo: as in `select`."""

        def chosen(rows: Rows) -> Rows:
            if isinstance(rows, torch.Tensor):
                return rows[index]
            # Rows that serve as keys and as values are those of a layer group.
            if self.keys is not self.values:
                return rows.select(index)
            return memo.get_or_make(rows, lambda: rows.select(index))

        frame = self.frame
        return replace(
            self,
            owner=owner,
            keys=chosen(self.keys),
            values=chosen(self.values),
            bias=None if self.bias is None else self.bias[index],
            mask=None if self.mask is None else self.mask[index],
            frame=None if frame is None else memo.get_or_make(frame, lambda: frame.select(index)),
            head=None if self.head is None else self.head[index],
        )

    def to(self, device: torch.device | str) -> "Segment":
        """The segment with its entries' tensors on `device`; parameters shared by all sequences stay where they are."""
        return replace(
            self,
            owner=self.owner.to(device),
            keys=self.keys.to(device),
            values=self.values.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            frame=None if self.frame is None else self.frame.to(device),
        )

    def entry_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors stored for the sequences themselves."""
        yield from (*stored_tensors(self.keys), *stored_tensors(self.values), self.owner)
        yield from (t for t in (self.bias, self.mask, self.head) if t is not None)
        if self.frame is not None:
            yield from self.frame.tensors()

    def host_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors stored for the sequences in host memory; none, unless a subclass retrieves rows from there."""
        yield from ()

    def parameter_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that all sequences share: the codec's maps, and the parameters of packed rows."""
        for rows in (self.keys, self.values):
            if not isinstance(rows, torch.Tensor):
                yield from rows.shared()
        for field in fields(self):
            if field.name in ("score_map", "value_map", "value_mean", "q_map", "out_map"):
                tensor = getattr(self, field.name)
                if tensor is not None:
                    yield tensor

    def materialize(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Full keys and values, [E, H, N, D] each, as ordinary attention would read them. For training, debugging and
        tests only."""
        keys, values = read_rows(self.keys, dtype), read_rows(self.values, dtype)
        if self.score_map is not None:
            keys = _spread(self.score_map, keys.shape[1]).to(dtype) @ keys
        if self.q_map is not None:
            keys = times_map(keys, self.q_map.to(dtype).transpose(-1, -2))
        if self.frame is not None:
            keys = self.frame.rotate(keys)
        if self.value_map is not None:
            values = _spread(self.value_map, values.shape[1]).to(dtype) @ values
        if self.value_mean is not None:
            values = values + self.value_mean.to(dtype)[:, None]
        if self.out_map is not None:
            values = times_map(values, self.out_map.to(dtype))
        return keys, values


def _owner_and_index(owner: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The new batch row of each selected entry, and the entry's old index."""
    owner, index = (t.clone() for t in (owner[None, :] == rows[:, None]).nonzero(as_tuple=True))
    return owner, index


def _spread(map_: torch.Tensor, heads: int) -> torch.Tensor:
    """A map of groups of heads, repeated to one matrix per head."""
    return map_.repeat_interleave(heads // map_.shape[0], dim=0)


def storage_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: the memory that they occupy, with a view's storage counted once
    and in full."""
    seen = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(seen.values())
