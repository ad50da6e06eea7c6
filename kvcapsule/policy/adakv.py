"""AdaKV (arXiv 2407.11550): SnapKV's score, with a layer's budget flowing between its KV heads to where the attention
is."""

from dataclasses import dataclass

import torch

from ..methods.kept_rows import keep_heads
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.segment import Segment
from .snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Of a span of T tokens, H heads keep H r T in all: first each its own best s r T, then the best of what is left,
    whosever they are.

    s is the safeguard, 0.2 in the authors' code as here. Chosen here: heads compete within a span, so that every image
    keeps its share; the rest is dealt out token by token, so that the total is exact (the paper blends each head's
    count among the best H r T with the even share and rounds); pooling is SnapKV's default, so that the two differ in
    their budgets alone (the authors' code takes the maximum). Heads of unlike budgets are stored as such: what a head
    does not keep takes no memory.
    """

    safeguard: float = 0.2
    """Share of an even budget that every head has for itself; 1 is SnapKV."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard {self.safeguard} is a share of an even budget: 0 to 1.")

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        scores = self.scores(prefill)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            kept[span.row, :, run] = self.dealt(scores[span.row, :, run], self.count(span.length))
        return Compressed(keep_heads(prefill, kept), text)

    def dealt(self, scores_HT: torch.Tensor, count: int) -> torch.Tensor:
        """[H, T] bool: H * count tokens, of which no head has less than the safeguard's share."""
        safe = scores_HT.argsort(dim=1, descending=True, stable=True)[:, : int(self.safeguard * count)]
        worth = scores_HT.scatter(1, safe, torch.inf).flatten()
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept[worth.argsort(descending=True, stable=True)[: scores_HT.shape[0] * count]] = True
        return kept.view_as(scores_HT)
