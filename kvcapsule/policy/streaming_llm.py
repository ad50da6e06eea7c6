"""StreamingLLM (arXiv 2309.17453): a span's first tokens as attention sinks, and its last ones."""

from dataclasses import dataclass

import torch

from ..methods.layer_prefill import LayerPrefill
from .base import TokenPruning


@dataclass(frozen=True)
class StreamingLLM(TokenPruning):
    """Of k kept tokens of a span: the first min(sinks, k), and the last k - sinks.

    The paper keeps four sinks and a recent window of the whole sequence, and counts positions within the cache. Here
    the rule is applied to each visual span by itself (the prompt's own sinks and its latest tokens are text, which
    stays), and tokens keep their positions.
    """

    sinks: int = 4
    """First tokens of a span that come before all others; the retention counts them in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks {self.sinks} count tokens: 0 or more.")

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        scores = torch.zeros(prefill.valid.shape, device=prefill.keys.device)
        for span in prefill.spans:
            place = torch.arange(span.length, device=scores.device, dtype=scores.dtype)
            # Later is better, but for the sinks, of which the first is the best of all.
            scores[span.row, span.start : span.start + span.length] = torch.where(
                place < self.sinks, 2 * span.length - place, place
            )
        return scores
