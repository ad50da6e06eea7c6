"""Equal bytes: the share of tokens with which a policy stores as many bytes of the prompts, visual and text together,
as another method.

Bytes are measured right after prefill on a sample of the questions. A policy that keeps the same number of tokens in
every layer changes its bytes by one token in all layers at once: of 10 kept tokens, that is 10 %. Where layers are
independent, the first layers therefore get the next higher share, as many of them as the bytes need.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.spans import VisualSpan

TOLERANCE = 0.02
"""Bytes count as equal if they differ by at most this share of the target."""
STEPS = 4096
"""Shares are multiples of 1 / STEPS."""
_LINEAR = 6
"""Measurements with linear interpolation, which suffice if bytes grow evenly with the share; then bisection follows."""


class Layout(NamedTuple):
    """Where the visual tokens of a batch are."""

    spans: list[VisualSpan]
    valid: torch.Tensor
    """[B, N] bool: False at padding."""


class PerLayer(Method):
    """A method for every layer of the model, so that bytes can be matched to one token in one layer."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = methods
        self.needs_hidden_states = any(method.needs_hidden_states for method in methods)
        self.reads_question = any(method.reads_question for method in methods)

    def compress(self, prefill: LayerPrefill) -> Compressed:
        return self.methods[prefill.layer].compress(prefill)

    def require_geometry(self, geometry: KVGeometry) -> None:
        for method in self.methods:
            method.require_geometry(geometry)

    def check_model(self, model: torch.nn.Module, strict: bool = False) -> None:
        for method in self.methods:
            method.check_model(model, strict)


Build = Callable[[float], Method]
"""Builds a method that keeps a share of the tokens, in (0, 1]."""


def match(target: int, build: Build, stored: Callable[[Method], int], layers: int) -> Method:
    """The method that stores `target` bytes within TOLERANCE, or else the next one that stores more.

    Args:
        target: measured bytes of another method.
        build: builds the method, or raises ValueError if the share is too low; bytes must grow with the share.
        stored: measures the bytes of a method.
        layers: number of layers of the model.
    """

    @cache
    def at(step: int) -> tuple[Method | None, int]:
        try:
            method = build(step / STEPS)
        except ValueError:
            # Some methods have a least share; what is refused at 1 has another cause.
            if step == STEPS:
                raise
            return None, 0
        return method, stored(method)

    most, _ = at(STEPS)
    mixable = most is not None and most.independent_layers and most.decode_time() is None
    low, high = _bracket(target, lambda step: at(step)[1], TOLERANCE if mixable else TOLERANCE / 4)
    candidates = [(method, size) for method, size in (at(low), at(high)) if method is not None]
    if mixable and len(candidates) == 2:
        candidates += _between(target, candidates[0], candidates[1], stored, layers)
    nearest = min(candidates, key=lambda pair: abs(pair[1] - target))
    if abs(nearest[1] - target) > TOLERANCE * target:
        nearest = min((pair for pair in candidates if pair[1] >= target), key=lambda pair: pair[1], default=nearest)
    return nearest[0]


def _bracket(target: int, at: Callable[[int], int], width: float) -> tuple[int, int]:
    """Steps with bytes below and above `target`: neighbours, or with bytes that differ by at most `width` of it; one
    end twice if the target is outside."""
    low, high = 1, STEPS
    if at(high) <= target or at(low) > target:
        return (high, high) if at(high) <= target else (low, low)
    above, tries = True, 0
    while high - low > 1 and at(high) - at(low) > width * target:
        slope = (at(high) - at(low)) / (high - low)
        # Aims beyond the target, in turn below and above it, so that the range shrinks from both ends.
        aim = target - at(low) + (-0.4 if above else 0.4) * width * target
        step = low + round(aim / slope) if tries < _LINEAR else (low + high) // 2
        step = min(max(step, low + 1), high - 1)
        above, tries = at(step) > target, tries + 1
        low, high = (low, step) if above else (step, high)
    return low, high


def _between(
    target: int, low: tuple[Method, int], high: tuple[Method, int], stored: Callable[[Method], int], layers: int
) -> list[tuple[Method, int]]:
    """The two mixtures nearest to `target`: the first n layers with the higher share, the others with the lower one."""
    mixtures = {0: low, layers: high}
    fewer, more = 0, layers
    while more - fewer > 1:
        middle = (fewer + more) // 2
        mixed = PerLayer([high[0]] * middle + [low[0]] * (layers - middle))
        mixtures[middle] = (mixed, stored(mixed))
        fewer, more = (middle, more) if mixtures[middle][1] <= target else (fewer, middle)
    return [mixtures[fewer], mixtures[more]]
