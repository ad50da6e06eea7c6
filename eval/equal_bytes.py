"""Equal bytes: the dial at which a policy stores as many bytes of the prompts, visual and text together, as another
method does.

Bytes are measured, right after prefill, on a sample of the questions: a policy may spend its budget as it likes. One
that keeps whole tokens, as many in every layer, hits a byte count to a token in each layer at best: of 10 kept tokens,
that is 10 %. Where layers can be dealt with one by one, the first of them are therefore given the next higher dial, as
many as it takes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.vlm.spans import VisualSpan

TOLERANCE = 0.02
"""Bytes are called equal when they differ by no more than this share of those that are matched."""
STEPS = 4096
"""Dials are multiples of 1 / STEPS."""
_LINEAR = 6
"""Measurements in which bytes that grow evenly with the dial are found; where they do not, the range is halved after
that."""


class Layout(NamedTuple):
    """Where the visual tokens of a batch are."""

    spans: list[VisualSpan]
    valid: torch.Tensor
    """[B, N] bool: False at padding."""


class PerLayer(Method):
    """A method for each layer of the model, so that bytes can be matched finer than by one token in every layer."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = methods

    def compress(self, prefill: LayerPrefill) -> Compressed:
        return self.methods[prefill.layer].compress(prefill)


Build = Callable[[float], Method]
"""A method at a dial, in (0, 1]."""


def match(target: int, build: Build, stored: Callable[[Method], int], layers: int) -> Method:
    """The method that stores about `target` bytes.

    Within TOLERANCE wherever the method allows it; where it does not, the next that stores more, so that a rival never
    has too little.

    Args:
        target: bytes that another method was measured to store.
        build: makes the method at a dial, or raises ValueError where it is too low; more bytes are expected of a higher
            one.
        stored: measures a method.
        layers: of the model.
    """

    @cache
    def at(step: int) -> tuple[Method | None, int]:
        try:
            method = build(step / STEPS)
        except ValueError:
            # Some methods have a least share; what is refused at 1 is no matter of the dial.
            if step == STEPS:
                raise
            return None, 0
        return method, stored(method)

    most, _ = at(STEPS)
    mixable = most is not None and most.independent_layers and most.decode_time() is None
    low, high = _bracket(target, lambda step: at(step)[1], TOLERANCE if mixable else TOLERANCE / 4)
    found = [(method, size) for method, size in (at(low), at(high)) if method is not None]
    if mixable and len(found) == 2:
        found += _between(target, found[0], found[1], stored, layers)
    nearest = min(found, key=lambda pair: abs(pair[1] - target))
    if abs(nearest[1] - target) > TOLERANCE * target:
        nearest = min((pair for pair in found if pair[1] >= target), key=lambda pair: pair[1], default=nearest)
    return nearest[0]


def _bracket(target: int, at: Callable[[int], int], width: float) -> tuple[int, int]:
    """Steps below and above `target`, neighbours or of bytes that are no further apart than `width` of it; the ends
    where it is outside."""
    low, high = 1, STEPS
    if at(high) <= target or at(low) > target:
        return (high, high) if at(high) <= target else (low, low)
    above, tries = True, 0
    while high - low > 1 and at(high) - at(low) > width * target:
        slope = (at(high) - at(low)) / (high - low)
        # Aimed past the target, now below it and now above, so that the range closes from both ends.
        aim = target - at(low) + (-0.4 if above else 0.4) * width * target
        step = low + round(aim / slope) if tries < _LINEAR else (low + high) // 2
        step = min(max(step, low + 1), high - 1)
        above, tries = at(step) > target, tries + 1
        low, high = (low, step) if above else (step, high)
    return low, high


def _between(
    target: int, low: tuple[Method, int], high: tuple[Method, int], stored: Callable[[Method], int], layers: int
) -> list[tuple[Method, int]]:
    """The two mixtures nearest to `target`: the first n layers by the higher dial, the others by the lower one."""
    mixtures = {0: low, layers: high}
    fewer, more = 0, layers
    while more - fewer > 1:
        middle = (fewer + more) // 2
        mixed = PerLayer([high[0]] * middle + [low[0]] * (layers - middle))
        mixtures[middle] = (mixed, stored(mixed))
        fewer, more = (middle, more) if mixtures[middle][1] <= target else (fewer, middle)
    return [mixtures[fewer], mixtures[more]]
