"""Segment: one stored piece of a layer's KV, in the one form that attention can read (docs/architecture.md).

Shapes, here and wherever the suffixes appear: B batch rows, E entries (pieces of equal form, each owned by a row), H KV
heads, G query heads per KV head, Q queries, N logical tokens of an entry, M stored rows, D head dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from .rotary_frame import Frame

T = TypeVar("T")


@runtime_checkable
class Packed(Protocol):
    """Rows that are stored in another form than they are read in."""

    @property
    def shape(self) -> torch.Size:
        """[E, H, M, D] of the rows as read."""

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The rows, [E, H, M, D]; or [E, S, M, D], where each of S sets of neighbouring heads stores its rows once."""

    def select(self, index: torch.Tensor) -> "Packed":
        """The entries `index`."""

    def to(self, device: torch.device | str) -> "Packed":
        """What is stored, on `device`; what is shared stays where it is."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is stored."""

    def shared(self) -> tuple[torch.Tensor, ...]:
        """Parameters that reading needs, the same for all sequences."""


@runtime_checkable
class Stepped(Packed, Protocol):
    """Packed rows whose elements are step * number + middle, both the same for all tokens of a channel: a product
    leaves them to its ends.

    Numbers lie around 0, so that what they add up to is not lost beside the middle.
    """

    step: torch.Tensor
    """[E, H, 1, D]."""
    middle: torch.Tensor
    """[E, H, 1, D]."""
    lanes: int
    """P: planes that the codes come in."""

    def planes(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The numbers, [E, H, D, n] in each plane: token t is column t // P of plane t % P; columns past the last mean
        nothing."""


Rows = torch.Tensor | Packed


def read(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a tensor [E, H, M, D]."""
    by_set = read_sets(rows, dtype)
    return (
        by_set.repeat_interleave(rows.shape[1] // by_set.shape[1], dim=1) if by_set.shape[1] < rows.shape[1] else by_set
    )


def read_sets(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a tensor [E, S, M, D]: what neighbouring heads have in common stands there once."""
    return rows.to(dtype) if isinstance(rows, torch.Tensor) else rows.read(dtype)


def stored(rows: Rows) -> tuple[torch.Tensor, ...]:
    return (rows,) if isinstance(rows, torch.Tensor) else rows.tensors()


@dataclass(frozen=True)
class Segment:
    """E entries of N logical tokens each, for the KV heads of one layer.

    For a query q of the entry's owner:

        q'  = rotate(q, -frame);  z = (q' q_map) keys^T * scale;  s = z score_map^T + bias
        p   = softmax of s over all segments of the row
        out = ((p value_map) values + sum(p) value_mean) out_map
    """

    keys: Rows
    """[E, H, M, Dk]."""
    values: Rows
    """[E, H, M', Dv]."""
    owner: torch.Tensor
    """[E] int64: the batch row that each entry belongs to."""
    score_map: torch.Tensor | None = None
    """[H, N, M]: scores of the N tokens from those of the M stored rows; a parameter, shared by all entries. None: N =
    M.

    A map with S < H heads (S divides H) serves H / S neighbouring heads with each of its own.
    """
    value_map: torch.Tensor | None = None
    """[H or S, N, M']: probabilities of N tokens to weights of M' stored rows; shared. None: N = M'."""
    value_mean: torch.Tensor | None = None
    """[H, Dv]: what every token's value has in common; shared."""
    q_map: torch.Tensor | None = None
    """[H, D, Dk]: shared."""
    out_map: torch.Tensor | None = None
    """[H, Dv, D]: shared."""
    bias: torch.Tensor | None = None
    """[E, H, N] added to the scores (the log of the mass that a row stands for)."""
    mask: torch.Tensor | None = None
    """[E, N] bool: False where an entry has no token (entries of uneven length). None: all are there."""
    frame: Frame | None = None
    """The tiles' frames, where the keys are stored in the canonical one."""
    head: torch.Tensor | None = None
    """[E] int64: the one KV head that each entry is of, where heads store unlike counts; H is then 1. None: entries
    hold all heads."""
    each_row: bool = False
    """Whether entry i is of batch row i, one for every row: said by who makes the segment, so that nobody has to ask
    the device."""

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
        """The segment that this query reads: itself, but for those that fetch their rows query by query."""
        return self

    @property
    def plain(self) -> bool:
        """Whether the rows are one run of tokens for every batch row, to be read as they are."""
        extra = (self.score_map, self.value_map, self.value_mean, self.q_map, self.out_map, self.frame)
        return self.each_row and all(x is None for x in extra)

    @property
    def tokens(self) -> int:
        """N: logical tokens of an entry, absent ones included."""
        return int(self.keys.shape[2] if self.score_map is None else self.score_map.shape[1])

    def select(self, rows: torch.Tensor, shared: "Shared | None" = None) -> "Segment":
        """The segment of the batch whose row i is the present row rows[i] (beam search, repeated or chosen rows).

        shared: given to the segments of all layers, it keeps what they have in common in one place.
        """
        shared = Shared() if shared is None else shared
        owner, index = shared.once(self.owner, lambda: _owned(self.owner, rows.to(self.owner.device)))

        def chosen(rows: Rows) -> Rows:
            if isinstance(rows, torch.Tensor):
                return rows[index]
            # Rows that are read as keys and as values are those of a stack of layers.
            return shared.once(rows, lambda: rows.select(index)) if self.keys is self.values else rows.select(index)

        frame = self.frame
        return replace(
            self,
            owner=owner,
            keys=chosen(self.keys),
            values=chosen(self.values),
            bias=None if self.bias is None else self.bias[index],
            mask=None if self.mask is None else self.mask[index],
            frame=None if frame is None else shared.once(frame, lambda: frame.select(index)),
            head=None if self.head is None else self.head[index],
        )

    def to(self, device: torch.device | str) -> "Segment":
        """The segment with what is stored for the sequences on `device`; what all sequences share stays where it is."""
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
        """What is stored for the sequences themselves."""
        yield from (*stored(self.keys), *stored(self.values), self.owner)
        yield from (t for t in (self.bias, self.mask, self.head) if t is not None)
        if self.frame is not None:
            yield from self.frame.tensors()

    def host_tensors(self) -> Iterator[torch.Tensor]:
        """What is kept for the sequences in the host's memory, beside the device's."""
        yield from ()

    def parameter_tensors(self) -> Iterator[torch.Tensor]:
        """What all sequences share: the codec's maps, and what packed rows are read with."""
        for rows in (self.keys, self.values):
            if not isinstance(rows, torch.Tensor):
                yield from rows.shared()
        for field in fields(self):
            if field.name in ("score_map", "value_map", "value_mean", "q_map", "out_map"):
                tensor = getattr(self, field.name)
                if tensor is not None:
                    yield tensor

    def materialize(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """The full keys and values, [E, H, N, D] each, as ordinary attention would read them: for training, debugging
        and tests only."""
        keys, values = read(self.keys, dtype), read(self.values, dtype)
        if self.score_map is not None:
            keys = _spread(self.score_map, keys.shape[1]).to(dtype) @ keys
        if self.q_map is not None:
            keys = keys @ self.q_map.to(dtype).transpose(-1, -2)
        if self.frame is not None:
            keys = self.frame.forward(keys)
        if self.value_map is not None:
            values = _spread(self.value_map, values.shape[1]).to(dtype) @ values
        if self.value_mean is not None:
            values = values + self.value_mean.to(dtype)[:, None]
        if self.out_map is not None:
            values = values @ self.out_map.to(dtype)
        return keys, values


class Shared:
    """What was already made anew of things that several segments have in common."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[object, Any]] = {}

    def once(self, thing: object, make: Callable[[], T]) -> T:
        """What `make` makes of a thing: made at the first call, the same at later ones."""
        if id(thing) not in self.made:
            # With the thing itself, which must live for its id to be its own.
            self.made[id(thing)] = (thing, make())
        made: T = self.made[id(thing)][1]
        return made


def _owned(owner: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The new owner of each selected entry, and which entry it was."""
    owner, index = (t.clone() for t in (owner[None, :] == rows[:, None]).nonzero(as_tuple=True))
    return owner, index


def _spread(map_: torch.Tensor, heads: int) -> torch.Tensor:
    """A map of sets of heads for each head."""
    return map_.repeat_interleave(heads // map_.shape[0], dim=0)


def storage_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: what memory they really hold, views counted once and whole."""
    seen = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(seen.values())
