"""What a method may do beside compressing one layer by itself: share a budget over the layers, and act again while
tokens are written.

A cache asks `start` for one run of its method for each forward that it compresses, and `revises` for what the method
does afterwards.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from ..segments.segment import Segment
from .layer_prefill import LayerPrefill


class Compressed(NamedTuple):
    """A layer's prefill as segments, visual and text apart so that their bytes can be told apart."""

    visual: list[Segment]
    text: list[Segment]


class Method(Protocol):
    """Anything that turns a layer's prefill into segments: a capsule or a policy."""

    def compress(self, prefill: LayerPrefill) -> Compressed:
        """Called once for each layer as its prefill ends, in the order of the layers."""


Observed = TypeVar("Observed")


class Run(Protocol):
    """One forward's compression, layer by layer."""

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        """Take the next layer; returns the layers that are compressed now, by their index: this one, none yet, or
        several at their last."""


class LayerByLayer:
    """Each layer is compressed as its prefill ends, so that at most one layer's keys and values are held in full."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        return [(prefill.layer, self.method.compress(prefill))]


class SharedBudget(ABC, Generic[Observed]):
    """A method whose layers share a budget: it observes all of them, then commits.

    Until the last layer is observed the keys and values of all of them are held, in full if `hold` does not say
    otherwise; their queries are not.
    """

    def hold(self, prefill: LayerPrefill) -> LayerPrefill:
        """What is held of a layer for `commit`."""
        return prefill.without_queries()

    @abstractmethod
    def observe(self, prefill: LayerPrefill) -> Observed:
        """What is needed of one layer when budgets are known: not its queries."""

    @abstractmethod
    def commit(self, prefills: Sequence[LayerPrefill], observed: Sequence[Observed]) -> list[Compressed]:
        """Compress all layers of one forward, given as `hold` left them and in their order, with what was observed of
        each."""

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        """A layer that is all there is: the whole budget is its own."""
        (compressed,) = self.commit([self.hold(prefill)], [self.observe(prefill)])
        return compressed

    def start(self, layers: Sequence[int]) -> Run:
        return _SharedRun(self, layers)


class _SharedRun(Generic[Observed]):
    def __init__(self, method: SharedBudget[Observed], layers: Sequence[int]) -> None:
        self.method, self.layers = method, layers
        self.prefills: list[LayerPrefill] = []
        self.observed: list[Observed] = []

    @torch.no_grad()
    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        self.observed.append(self.method.observe(prefill))
        self.prefills.append(self.method.hold(prefill))
        if len(self.observed) < len(self.layers):
            return []
        compressed = self.method.commit(self.prefills, self.observed)
        layers = [p.layer for p in self.prefills]
        self.prefills, self.observed = [], []
        return list(zip(layers, compressed, strict=True))


@runtime_checkable
class Starts(Protocol):
    """A method that makes its runs itself."""

    def start(self, layers: Sequence[int]) -> Run:
        """A run over these layers (indices in the model, in their order)."""


def start(method: Any, layers: Sequence[int]) -> Run:
    """One forward's compression by a method; layer by layer where the method does not say otherwise."""
    return method.start(layers) if isinstance(method, Starts) else LayerByLayer(method)


def reads_hidden(method: Any) -> bool:
    """Whether a method asks for the residual stream (LayerPrefill.hidden), by an attribute `reads_hidden` that is
    True."""
    return bool(getattr(method, "reads_hidden", False))


class Written(NamedTuple):
    """A layer while tokens are written: B rows, M tokens since the last prefill or revision, W latest queries."""

    layer: int
    visual: list[Segment]
    text: list[Segment]
    keys: torch.Tensor
    """[B, H, M, D], rotated as the model does; a view that is overwritten afterwards."""
    values: torch.Tensor
    """As keys."""
    seen: torch.Tensor
    """[B, M] bool: False at padding."""
    query: torch.Tensor
    """[B, H * G, W, D]: the latest queries, at most `window` of the method."""
    scale: float


@runtime_checkable
class Revises(Protocol):
    """A method that acts again while tokens are written."""

    every: int
    """Tokens after which it acts: when this many or more were written since it last did, `window` of them at least in
    the tail.

    The others lie in text segments: a new image in a later turn closes the tail before it is full.
    """
    window: int
    """Latest queries that the cache keeps for it."""

    def revise(self, written: Written) -> Compressed:
        """The layer's segments from now on, in place of those that were and of the whole tail, which is emptied."""
