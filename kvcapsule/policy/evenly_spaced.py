"""Keep every k-th visual token: the yardstick that any ranking must beat."""

from dataclasses import dataclass

import torch

from ..methods.layer_prefill import LayerPrefill
from .base import TokenPruning


@dataclass(frozen=True)
class EvenlySpaced(TokenPruning):
    """Tokens at even distances along each span, whatever they hold."""

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        scores = torch.zeros(prefill.valid.shape, device=prefill.keys.device)
        for span in prefill.spans:
            count = max(1, round(self.retention * span.length))
            chosen = ((torch.arange(count, device=scores.device) + 0.5) * span.length / count).long()
            scores[span.row, span.start + chosen] = 1.0
        return scores
