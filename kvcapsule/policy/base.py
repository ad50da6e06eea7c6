"""What a policy is: a training-free rule for a layer's tokens."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..codec.kvcapsule import check_ratio
from ..methods.kept_rows import keep
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, Method
from ..segments.segment import Segment


class Policy(Method):
    """A training-free method; a frozen dataclass, whose fields are its settings."""

    compresses_text: ClassVar[bool] = True
    """Whether it acts on the text too, so that it can be the text's method beside a capsule (see Combined)."""


class VisualPolicy(Policy):
    """A policy that acts on visual tokens and keeps all text raw."""

    compresses_text = False

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        visual = prefill.visual()
        text = keep(prefill, prefill.valid & ~visual)
        if not prefill.spans:
            return Compressed([], text)
        return self.compress_visual(prefill, text)

    @abstractmethod
    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        """Segments of a prefill that has at least one visual span."""


@dataclass(frozen=True)
class TokenPruning(VisualPolicy):
    """Keeps the same share of every visual span's tokens, those with the highest scores, raw and at their positions."""

    budget_field = "retention"

    retention: float
    """Kept visual tokens / visual tokens, in (0, 1]."""

    def __post_init__(self) -> None:
        check_ratio(self.retention)

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        scores = self.scores(prefill)
        kept = torch.zeros_like(prefill.valid)
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            best = scores[span.row, run].topk(max(1, round(self.retention * span.length))).indices
            kept[span.row, span.start + best] = True
        return Compressed(keep(prefill, kept), text)

    @abstractmethod
    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, N]: what each token is worth; only visual tokens are looked at."""
