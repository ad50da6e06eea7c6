"""Methods whose layers share one budget: all layers are observed before any is compressed."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from .layer_prefill import LayerPrefill
from .method import Compressed, CompressionPass, Method

Observation = TypeVar("Observation")
"""What a method measures of one layer before budgets are known."""


class SharedBudget(Method, Generic[Observation]):
    """A method whose layers share a budget: it observes all of them, then commits.

    Until the last layer is observed the keys and values of all of them are held, in full if `retain` does not say
    otherwise; their queries are not.
    """

    independent_layers = False

    def retain(self, prefill: LayerPrefill) -> LayerPrefill:
        """What is held of a layer for `commit`."""
        return prefill.without_queries()

    @abstractmethod
    def observe(self, prefill: LayerPrefill) -> Observation:
        """What is needed of one layer when budgets are known: not its queries."""

    @abstractmethod
    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[Observation]) -> list[Compressed]:
        """Compress all layers of one forward, given as `retain` left them and in their order, with the observation of
        each."""

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        """A model's only layer: the budget is not shared."""
        (compressed,) = self.commit([self.retain(prefill)], [self.observe(prefill)])
        return compressed

    def begin_pass(self, layers: Sequence[int]) -> CompressionPass:
        return _SharedBudgetPass(self, layers)


class _SharedBudgetPass(Generic[Observation]):
    def __init__(self, method: SharedBudget[Observation], layers: Sequence[int]) -> None:
        self.method, self.layers = method, layers
        self.prefills: list[LayerPrefill] = []
        self.observations: list[Observation] = []

    @torch.no_grad()
    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        self.observations.append(self.method.observe(prefill))
        self.prefills.append(self.method.retain(prefill))
        if len(self.observations) < len(self.layers):
            return []
        compressed = self.method.commit(self.prefills, self.observations)
        layers = [p.layer for p in self.prefills]
        self.prefills, self.observations = [], []
        return list(zip(layers, compressed, strict=True))
