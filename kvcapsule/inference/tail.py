"""The raw tail of a cache layer: keys and values of the tokens written since the last compression."""

import torch

from ..errors import ConfigError
from ..segments.segment import Segment

_STEP = 64
"""Fewest tokens by which a full buffer grows."""


class Tail:
    """A buffer that grows by half of its size when it is full."""

    keys: torch.Tensor
    """[B, H, capacity, D], of which `length` tokens are written."""
    values: torch.Tensor
    """As keys."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """An empty tail in the form of keys and values [B, H, N, D]."""
        self.keys = keys.new_empty(*keys.shape[:2], 0, keys.shape[3])
        self.values = values.new_empty(*values.shape[:2], 0, values.shape[3])
        self.length = 0
        self._owner: torch.Tensor | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write new tokens [B, H, N, D] behind the others; the buffer grows where they do not fit."""
        needed = self.length + keys.shape[2]
        if needed > self.keys.shape[2]:
            capacity = max(needed, self.keys.shape[2] + max(_STEP, self.keys.shape[2] // 2))
            self.keys = _enlarged(self.keys, self.length, capacity)
            self.values = _enlarged(self.values, self.length, capacity)
        self.keys[:, :, self.length : needed] = keys
        self.values[:, :, self.length : needed] = values
        self.length = needed

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the written tokens, [B, H, length, D]; views."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def segment(self) -> Segment:
        """The written tokens as attention reads them."""
        return Segment(*self.written(), self._row_owner(), each_row=True)

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

    def clear(self, max_capacity: int = 0) -> None:
        """Remove all tokens; free a buffer of more than `max_capacity` tokens."""
        self.length = 0
        if self.keys.shape[2] > max_capacity:
            self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()

    def crop(self, count: int) -> None:
        """Remove the last `count` tokens."""
        self.length -= count

    def select(self, rows: torch.Tensor) -> None:
        """Make row i what is now row rows[i]."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def move(self, device: torch.device) -> None:
        self.keys, self.values = self.keys.to(device), self.values.to(device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The buffers, with their unwritten part."""
        return (self.keys, self.values)

    def _row_owner(self) -> torch.Tensor:
        """Segment.owner [B]; the same tensor at every step, so that kernels recognise it."""
        if self._owner is None or len(self._owner) != self.keys.shape[0] or self._owner.device != self.keys.device:
            self._owner = torch.arange(self.keys.shape[0], device=self.keys.device)
        return self._owner


class StaticTail(Tail):
    """A buffer of fixed capacity at a fixed address, its length on the device, so that all decode steps have the same
    shapes.

    A decode step can then be compiled, or captured into a CUDA graph. Attention reads the whole buffer under a mask of
    the written tokens.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> None:
        """capacity: tokens that can be written before the next compression."""
        self.keys = keys.new_zeros(*keys.shape[:2], capacity, keys.shape[3])
        self.values = values.new_zeros(*values.shape[:2], capacity, values.shape[3])
        self.capacity = capacity
        self.count = torch.zeros((), dtype=torch.int64, device=keys.device)
        """Tokens written."""
        self._owner = None
        self._indices = torch.arange(capacity, device=keys.device)
        self._segment = Segment(self.keys, self.values, self._row_owner(), each_row=True)
        for tensor in (self.keys, self.values, self.count):
            torch._dynamo.mark_static_address(tensor)

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens written, known to the host: asks the device."""
        return int(self.count)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raises ConfigError if the tokens do not fit; not in a compiled step, where generate's limit holds."""
        new = keys.shape[2]
        if not torch.compiler.is_compiling() and keys.device.type == "cpu" and self.length + new > self.capacity:
            raise ConfigError(
                f"{self.length + new} tokens do not fit into a tail of {self.capacity}: make the CapsuleCache with a"
                " larger tail_capacity (what is generated, and the text of later turns), or without, so that it grows."
            )
        indices = self._indices[:new] + self.count
        self.keys.index_copy_(2, indices, keys)
        self.values.index_copy_(2, indices, values)
        self.count.add_(new)

    def segment(self) -> Segment:
        return self._segment

    def mask_length(self, new: int) -> int:
        return self.capacity if new == 1 else self.length + new

    def visible(self, mask: torch.Tensor | None, queries: int) -> torch.Tensor:
        if mask is not None:
            return torch.nn.functional.pad(mask[:, 0], (0, self.capacity - mask.shape[3]), value=False)
        behind = torch.arange(queries - 1, -1, -1, device=self.count.device)
        return (self._indices[None] < (self.count - behind)[:, None])[None]

    def clear(self, max_capacity: int = 0) -> None:
        self.count.zero_()

    def crop(self, count: int) -> None:
        self.count.sub_(count)

    def select(self, rows: torch.Tensor) -> None:
        keys, values, count = self.keys.index_select(0, rows), self.values.index_select(0, rows), self.count
        if len(rows) != self.keys.shape[0]:
            self.__init__(keys, values, self.capacity)  # type: ignore[misc]
        self.keys.copy_(keys)
        self.values.copy_(values)
        self.count.copy_(count)

    def move(self, device: torch.device) -> None:
        raise NotImplementedError(
            "a static tail stays at its address: make the CapsuleCache without tail_capacity to offload it."
        )


def _enlarged(buffer: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    enlarged = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    enlarged[:, :, :used] = buffer[:, :, :used]
    return enlarged


def raw_segment(keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> Segment:
    """Raw rows [B, H, N, D] of all batch rows as a segment; mask: [B, N] bool, False where there is no token."""
    return Segment(keys, values, torch.arange(keys.shape[0], device=keys.device), mask=mask, each_row=True)


def make_tail(keys: torch.Tensor, values: torch.Tensor, capacity: int | None) -> Tail:
    """An empty tail in the form of keys and values [B, H, N, D]: static with a capacity, growing without."""
    return Tail(keys, values) if capacity is None else StaticTail(keys, values, capacity)
