"""Keep visual tokens drawn at random: what a ranking is worth shows in the distance to it."""

from dataclasses import dataclass

import torch

from ..methods.layer_prefill import LayerPrefill
from .base import TokenPruning

_APART = 4096
"""Layers, and spans of a row, whose seeds are kept apart."""


@dataclass(frozen=True)
class Random(TokenPruning):
    """Score of a token: a uniform draw that depends on the seed, the layer and the number of the span in its row, and
    on nothing else.

    So a row keeps the same tokens alone and in any batch, and every layer others. All heads keep the same tokens.
    """

    seed: int = 0
    """Another one gives another draw."""

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        scores = torch.zeros(prefill.valid.shape, device=prefill.keys.device)
        spans_of: dict[int, int] = {}
        for span in sorted(prefill.spans):
            number = spans_of[span.row] = spans_of.get(span.row, -1) + 1
            # On the CPU: every device then keeps the same tokens.
            generator = torch.Generator().manual_seed(((self.seed * _APART + prefill.layer) * _APART + number) % 2**63)
            drawn = torch.rand(span.length, generator=generator)
            scores[span.row, span.start : span.start + span.length] = drawn.to(scores.device)
        return scores
