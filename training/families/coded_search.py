"""Rows and bits of a coded compact capsule: candidates for each layer, what they cost in bytes and in error, and the
choice that spends a budget best over all layers.

M stored rows of a tile, C channels, E tiles, H KV heads, G groups of eight rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvcapsule.codec.bit_allocation import DISTORTION
from kvcapsule.segments.bit_packing import GROUP, WIDTHS

SIDE = 2
"""Bytes of a channel's scale and minimum."""


@dataclass(frozen=True)
class PartShape:
    """Bits of the channels of one layer's keys or values, for one number of rows."""

    widths: torch.Tensor
    """[C] uint8, of the first C axes of the basis."""

    def head_bytes(self, rows: int) -> int:
        """Bytes that one head of a tile stores."""
        return -(-rows // GROUP) * int(self.widths.sum()) + SIDE * len(self.widths)


class Candidate(NamedTuple):
    """One way to code a layer."""

    rows: int
    keys: PartShape
    values: PartShape
    bytes: int
    """Of a tile, its bias included."""
    error: float
    """Expected KL in nats that this layer alone adds."""


def allocate_widths(energy_C: torch.Tensor, variance_C: torch.Tensor, bits: float, rows: int) -> PartShape:
    """Bits of the channels that minimise the expected squared error, for `bits` a channel on average.

    Args:
        energy_C: mean square of each channel, in the order of the basis: the error of leaving it out.
        variance_C: mean variance within a tile: what a channel's codes have to describe.
        bits: side information included.
        rows: that share the side information of a channel.
    """
    groups, count = -(-rows // GROUP), len(energy_C)
    budget = groups * bits * count
    ladder = (0, *WIDTHS)
    widths = [0] * count
    error = [float(x) for x in energy_C]

    def step(channel: int) -> tuple[float, int, float, int]:
        """(gain per byte, bytes, error, width) of the best rise of a channel's width."""
        rises = []
        for width in ladder[ladder.index(widths[channel]) + 1 :]:
            price = groups * (width - widths[channel]) + (0 if widths[channel] else SIDE)
            lower = float(variance_C[channel]) * DISTORTION[width]
            rises.append(((error[channel] - lower) / price, price, lower, width))
        return max(rises)

    steps = {channel: step(channel) for channel in range(count)}
    while steps:
        channel = max(steps, key=lambda c: steps[c][0])
        gain, price, lower, width = steps.pop(channel)
        if price > budget or gain <= 0:
            continue
        budget -= price
        widths[channel], error[channel] = width, lower
        if width < ladder[-1]:
            steps[channel] = step(channel)
    last = max((i for i, width in enumerate(widths) if width), default=0)
    # Channels without bits in between would need a map of their own; the basis orders them by energy, so they are few.
    return PartShape(torch.tensor([max(1, width) for width in widths[: last + 1]], dtype=torch.uint8))


def choose(candidates: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """One candidate for each layer, with the least sum of errors for at most `budget` bytes.

    Lagrangian relaxation finds the best choice on the convex hull; what is left is spent on the single changes that
    gain most per byte.

    Raises:
        ValueError: if the smallest candidates take more.
    """
    smallest = [min(layer, key=lambda c: (c.bytes, c.error)) for layer in candidates]
    if sum(c.bytes for c in smallest) > budget:
        raise ValueError(f"{sum(c.bytes for c in smallest)} bytes is the least, {budget} are allowed.")

    def best(price: float) -> list[Candidate]:
        return [min(layer, key=lambda c: c.error + price * c.bytes) for layer in candidates]

    low, high = 0.0, 1.0
    while sum(c.bytes for c in best(high)) > budget and high < 1e30:
        high *= 4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(c.bytes for c in best(middle)) <= budget else (middle, high)
    chosen = best(high)
    chosen = chosen if sum(c.bytes for c in chosen) <= budget else smallest
    while True:
        left = budget - sum(c.bytes for c in chosen)
        changes = list(_changes(chosen, candidates, left))
        if not changes:
            return chosen
        _, layer, candidate = max(changes, key=lambda change: change[0])
        chosen[layer] = candidate


def _changes(
    chosen: Sequence[Candidate], candidates: Sequence[Sequence[Candidate]], left: int
) -> Iterator[tuple[float, int, Candidate]]:
    """(gain per byte, layer, candidate) of all single changes that lower the error and cost at most `left` bytes."""
    for layer, (now, options) in enumerate(zip(chosen, candidates, strict=True)):
        for option in options:
            price, gain = option.bytes - now.bytes, now.error - option.error
            if price <= left and gain > 0:
                yield gain / max(price, 1e-3), layer, option
