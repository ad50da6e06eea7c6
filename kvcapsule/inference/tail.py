"""The raw tail of a cache layer: the keys and values of what was written since the last compression."""

import torch

from ..segments.segment import Segment

_STEP = 64
"""Tokens by which a full buffer grows."""


class Tail:
    """A buffer that grows with what is written: by half of itself, so that a token costs no copy of all others."""

    keys: torch.Tensor
    """[B, H, room, D], of which `length` tokens are written."""
    values: torch.Tensor
    """As keys."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """An empty tail in the form of keys and values [B, H, N, D]."""
        self.keys = keys.new_empty(*keys.shape[:2], 0, keys.shape[3])
        self.values = values.new_empty(*values.shape[:2], 0, values.shape[3])
        self.length = 0
        self._owner: torch.Tensor | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        needed = self.length + keys.shape[2]
        if needed > self.keys.shape[2]:
            room = max(needed, self.keys.shape[2] + max(_STEP, self.keys.shape[2] // 2))
            self.keys, self.values = _grown(self.keys, self.length, room), _grown(self.values, self.length, room)
        self.keys[:, :, self.length : needed] = keys
        self.values[:, :, self.length : needed] = values
        self.length = needed

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that are there, [B, H, length, D]; views."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def segment(self) -> Segment:
        """What attention reads."""
        return Segment(*self.written(), self._every_row(), each_row=True)

    def mask_length(self, new: int) -> int:
        """Tokens of the segment once `new` more are written."""
        return self.length + new

    def visible(self, mask: torch.Tensor | None, queries: int) -> torch.Tensor | None:
        """Which tokens of the segment each of the latest queries sees: [B or 1, Q, N] bool, or None for all.

        Args:
            mask: [B or 1, 1, Q, N] bool; None: a query sees all that was written before it.
        """
        if mask is not None:
            return mask[:, 0]
        if queries == 1:
            return None
        return torch.ones(queries, self.length, dtype=torch.bool, device=self.keys.device).tril(self.length - queries)[
            None
        ]

    def clear(self, most: int = 0) -> None:
        """Forget what is written; a buffer of more than `most` tokens is given back."""
        self.length = 0
        if self.keys.shape[2] > most:
            self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens."""
        self.length -= count

    def select(self, rows: torch.Tensor) -> None:
        """Make row i what is now row rows[i]."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def move(self, device: torch.device) -> None:
        self.keys, self.values = self.keys.to(device), self.values.to(device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is stored, room to grow included."""
        return (self.keys, self.values)

    def _every_row(self) -> torch.Tensor:
        """The owner [B]; the same tensor at every step, by which kernels know it again."""
        if self._owner is None or len(self._owner) != self.keys.shape[0] or self._owner.device != self.keys.device:
            self._owner = torch.arange(self.keys.shape[0], device=self.keys.device)
        return self._owner


class StaticTail(Tail):
    """A buffer of fixed room at a fixed address, its length on the device: a step's shapes and launches are those of
    the step before.

    So a decode step can be compiled, or captured into a CUDA graph. Attention is given the whole room and a mask of
    what is written.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """room: tokens that can be written before the next compression."""
        self.keys = keys.new_zeros(*keys.shape[:2], room, keys.shape[3])
        self.values = values.new_zeros(*values.shape[:2], room, values.shape[3])
        self.room = room
        self.count = torch.zeros((), dtype=torch.int64, device=keys.device)
        """Tokens written."""
        self._owner = None
        self._place = torch.arange(room, device=keys.device)
        self._whole = Segment(self.keys, self.values, self._every_row(), each_row=True)
        for tensor in (self.keys, self.values, self.count):
            torch._dynamo.mark_static_address(tensor)

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens written, known to the host: asks the device."""
        return int(self.count)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raises ValueError for more than the room left (in a step that is not compiled; generate's own limit holds in
        one that is)."""
        new = keys.shape[2]
        if not torch.compiler.is_compiling() and keys.device.type == "cpu" and self.length + new > self.room:
            raise ValueError(
                f"{self.length + new} tokens do not fit into a tail of {self.room}: make the CapsuleCache with more"
                " room (what is generated, and the text of later turns), or without, so that it grows."
            )
        place = self._place[:new] + self.count
        self.keys.index_copy_(2, place, keys)
        self.values.index_copy_(2, place, values)
        self.count.add_(new)

    def segment(self) -> Segment:
        return self._whole

    def mask_length(self, new: int) -> int:
        return self.room if new == 1 else self.length + new

    def visible(self, mask: torch.Tensor | None, queries: int) -> torch.Tensor:
        if mask is not None:
            return torch.nn.functional.pad(mask[:, 0], (0, self.room - mask.shape[3]), value=False)
        behind = torch.arange(queries - 1, -1, -1, device=self.count.device)
        return (self._place[None] < (self.count - behind)[:, None])[None]

    def clear(self, most: int = 0) -> None:
        self.count.zero_()

    def crop(self, count: int) -> None:
        self.count.sub_(count)

    def select(self, rows: torch.Tensor) -> None:
        keys, values, count = self.keys.index_select(0, rows), self.values.index_select(0, rows), self.count
        if len(rows) != self.keys.shape[0]:
            self.__init__(keys, values, self.room)  # type: ignore[misc]
        self.keys.copy_(keys)
        self.values.copy_(values)
        self.count.copy_(count)

    def move(self, device: torch.device) -> None:
        raise NotImplementedError(
            "a static tail stays at its address: make the CapsuleCache without room to offload it."
        )


def _grown(buffer: torch.Tensor, used: int, room: int) -> torch.Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
    grown[:, :, :used] = buffer[:, :, :used]
    return grown
