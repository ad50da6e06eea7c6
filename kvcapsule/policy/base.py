"""What a policy is: a training-free rule for a layer's tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..codec.kvcapsule import check_ratio
from ..methods.kept_rows import keep
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.segment import Segment


class Policy(ABC):
    """A training-free method; a frozen dataclass, whose fields are its settings."""

    DIAL: ClassVar[str | None] = None
    """The setting that says how much is kept, from 0 to 1 (all): "ratio" of the visual tokens, "budget" of all; None:
    there is none."""
    SEPARABLE: ClassVar[bool] = True
    """Whether what it stores of the visual tokens and of the text can be had one without the other (see Paired)."""

    @abstractmethod
    def compress(self, prefill: LayerPrefill) -> Compressed:
        """A layer's prefill as segments; see kvcapsule.methods.method.Method."""


class VisualPolicy(Policy):
    """A policy that acts on visual tokens and keeps all text raw."""

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

    DIAL = "ratio"

    ratio: float
    """Kept visual tokens / visual tokens, in (0, 1]."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        scores = self.scores(prefill)
        kept = torch.zeros_like(prefill.valid)
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            best = scores[span.row, run].topk(max(1, round(self.ratio * span.length))).indices
            kept[span.row, span.start + best] = True
        return Compressed(keep(prefill, kept), text)

    @abstractmethod
    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, N]: what each token is worth; only visual tokens are looked at."""
