"""Bases of policies: training-free rules for the tokens of a layer; some act on visual tokens alone, some only keep or
drop tokens, for all heads alike or head by head."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, Method
from ..methods.ratios import check_ratio
from ..segments.segment import Segment


class Policy(Method):
    """A training-free method; a frozen dataclass, whose fields are its settings."""

    compresses_text: ClassVar[bool] = True
    """Whether it acts on the text too, so that it can be the text's method beside a capsule (see Combined)."""
    drops_tokens: ClassVar[bool] = False
    """Whether it drops tokens though it has no budget setting; a policy with one always does."""


class VisualPolicy(Policy):
    """A policy that acts on visual tokens and keeps all text raw."""

    compresses_text = False

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        visual = prefill.visual()
        text = gather_kept(prefill, prefill.valid & ~visual, alike="text")
        if not prefill.spans:
            return Compressed([], text)
        return self.compress_visual(prefill, text)

    @abstractmethod
    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        """Segments of a prefill that has at least one visual span."""


@dataclass(frozen=True)
class SpanPruning(VisualPolicy):
    """Keeps the same share of the tokens of every visual span."""

    budget_field = "retention"

    retention: float
    """Kept visual tokens / visual tokens, in (0, 1]."""

    def __post_init__(self) -> None:
        check_ratio(self.retention)

    def count(self, length: int) -> int:
        """Kept tokens of a span of `length`."""
        return max(1, round(self.retention * length))


@dataclass(frozen=True)
class TokenPruning(SpanPruning):
    """Keeps the same share of every visual span's tokens, those with the highest scores, raw and at their positions."""

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        scores = self.scores(prefill)
        kept = torch.zeros_like(prefill.valid)
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            best = scores[span.row, run].topk(self.count(span.length)).indices
            kept[span.row, span.start + best] = True
        return Compressed(gather_kept(prefill, kept), text)

    @abstractmethod
    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, N]: what each token is worth; only visual tokens are looked at."""


@dataclass(frozen=True)
class HeadPruning(SpanPruning):
    """Keeps the same number of every visual span's tokens in every KV head, each head its own, raw and at their
    positions.

    Rows of different tokens lie side by side, [E, H, M, D]: keys carry their rotation and attention needs no more, so
    which tokens they are is stored nowhere.
    """

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        scores = self.scores(prefill)
        batch, heads, tokens, _ = prefill.keys.shape
        # What a head keeps of a span is moved to the span's beginning: there all heads keep the same places.
        source = torch.arange(tokens, device=scores.device).repeat(batch, heads, 1)
        kept = torch.zeros_like(prefill.valid)
        for span in prefill.spans:
            count = self.count(span.length)
            ranked = scores[span.row, :, span.start : span.start + span.length].argsort(
                dim=-1, descending=True, stable=True
            )
            source[span.row, :, span.start : span.start + count] = span.start + ranked[:, :count].sort(dim=-1).values
            kept[span.row, span.start : span.start + count] = True
        moved = replace(prefill, keys=_take(prefill.keys, source), values=_take(prefill.values, source))
        return Compressed(gather_kept(moved, kept), text)

    @abstractmethod
    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, H, N]: what each token is worth to each KV head; only visual tokens are looked at."""


def _take(x_BHND: torch.Tensor, source_BHN: torch.Tensor) -> torch.Tensor:
    return x_BHND.gather(2, source_BHN[..., None].expand(-1, -1, -1, x_BHND.shape[3]))
