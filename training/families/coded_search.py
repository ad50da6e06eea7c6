"""Rows and bits of a coded compact capsule: candidates for each layer, what they cost in bytes and in error, and the
choice that spends a budget best over all layers and heads.

M stored rows of a tile, C channels, H KV heads; I and J ways to give bits to the keys and to the values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import torch

from kvcapsule.segments.mixed_width_rows import WIDEST

_UNIFORM = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035)
"""Squared error of the best uniform quantiser of 0 to 7 bits, relative to a Gaussian's variance (Max, 1960)."""
SIDE = 1
"""Bytes of a channel's scale and minimum."""
_HIGHEST = 1e18
"""Price of a byte in nats at which nothing but bytes matters."""


def allocate_widths(energy_HC: torch.Tensor, variance_HC: torch.Tensor, bits: float, rows: int) -> torch.Tensor:
    """Bits [H, C] uint8 of the channels that minimise each head's expected squared error, for `bits` a channel on
    average.

    Args:
        energy_HC: the error of a channel without bits.
        variance_HC: what a channel's codes have to describe.
        bits: side information included.
        rows: that share the side information of a channel.
    """
    return torch.stack(
        [
            _widths(energy.tolist(), variance.tolist(), bits, rows)
            for energy, variance in zip(energy_HC, variance_HC, strict=True)
        ]
    )


def _widths(energy: list[float], variance: list[float], bits: float, rows: int) -> torch.Tensor:
    """Of one head: the step that lowers the error most for its bits, again and again."""
    left, widths, error = bits * rows * len(energy), [0] * len(energy), list(energy)

    def best_step(channel: int) -> tuple[float, int, int]:
        """(error that it adds per bit, channel, new width) of the best rise of a channel's width."""
        now = widths[channel]
        return min(
            ((variance[channel] * _UNIFORM[width] - error[channel]) / _price(now, width, rows), channel, width)
            for width in range(now + 1, WIDEST + 1)
        )

    steps = [best_step(channel) for channel in range(len(energy))]
    heapify(steps)
    while steps:
        gain, channel, width = heappop(steps)
        price = _price(widths[channel], width, rows)
        if gain >= 0 or price > left:
            continue
        left -= price
        widths[channel], error[channel] = width, variance[channel] * _UNIFORM[width]
        if width < WIDEST:
            heappush(steps, best_step(channel))
    return torch.tensor(widths, dtype=torch.uint8)


def _price(now: int, width: int, rows: int) -> int:
    return rows * (width - now) + (0 if now else 8 * SIDE)


def head_bytes(widths_HC: torch.Tensor, rows: int) -> torch.Tensor:
    """[H]: what one head of a tile stores of its keys or its values."""
    widths = widths_HC.long()
    return rows * -(-widths.sum(1) // 8) + SIDE * (widths > 0).sum(1)


class Candidates(NamedTuple):
    """Ways to code a layer with one number of rows: each head has one of I ways for its keys and one of J for its
    values."""

    rows: int
    keys: torch.Tensor
    """[I, H, C] uint8 bits."""
    values: torch.Tensor
    """[J, H, C] uint8 bits."""
    bytes: torch.Tensor
    """[I, J, H] of a tile, with the bias."""
    error: torch.Tensor
    """[I, J, H] float64: expected KL in nats that this head alone adds."""

    @classmethod
    def of(cls, rows: int, keys: torch.Tensor, values: torch.Tensor, error: torch.Tensor) -> "Candidates":
        """With the bytes that follow from the rest."""
        sizes = [torch.stack([head_bytes(widths, rows) for widths in ways]) for ways in (keys, values)]
        return cls(rows, keys, values, sizes[0][:, None] + sizes[1] + rows, error)

    def best(self, price: float) -> "LayerCoding":
        """Of each head the way with the least error + price * bytes."""
        cost = (self.error + price * self.bytes).flatten(0, 1)
        of_keys, of_values = torch.unravel_index(cost.argmin(0), self.error.shape[:2])
        heads = torch.arange(cost.shape[1])
        at = of_keys, of_values, heads
        widths = self.keys[of_keys, heads], self.values[of_values, heads]
        return LayerCoding(self.rows, *widths, int(self.bytes[at].sum()), float(self.error[at].sum()))


@dataclass(frozen=True)
class LayerCoding:
    """How a layer is coded: its rows, and the bits of each channel."""

    rows: int
    keys: torch.Tensor
    """[H, C] uint8 bits."""
    values: torch.Tensor
    """[H, C] uint8 bits."""
    bytes: int
    """Of a tile."""
    error: float
    """Expected KL in nats that the layer alone adds."""


def choose(layers: Sequence[Sequence[Candidates]], budget: int) -> list[LayerCoding]:
    """One choice for each layer, with the least sum of errors for at most `budget` bytes, by Lagrangian relaxation: the
    best one on the convex hull.

    Raises:
        ValueError: if the smallest choices take more.
    """

    def at(price: float) -> list[LayerCoding]:
        ways = [[candidates.best(price) for candidates in layer] for layer in layers]
        return [min(layer, key=lambda c: c.error + price * c.bytes) for layer in ways]

    def fits(price: float) -> bool:
        return sum(choice.bytes for choice in at(price)) <= budget

    price = _least_price(fits)
    if price is None:
        least = sum(choice.bytes for choice in at(_HIGHEST))
        raise ValueError(f"{least} bytes is the least, {budget} are allowed.")
    return at(price)


def _least_price(fits: Callable[[float], bool]) -> float | None:
    """The least price of a byte at which the choices fit into the budget, to a thousandth; None if there is none."""
    low, high = 1 / _HIGHEST, _HIGHEST
    if not fits(high):
        return None
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
