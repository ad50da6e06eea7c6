"""AirCache (arXiv 2503.23956): few text tokens, the elite, rank the visual ones; layers share a budget by how much and
how unevenly.

    Att   = softmax(Q_t K_t^T * scale)           over text tokens alone
    E     = text tokens j with Att_last,j >= alpha max_j Att_last,j
    A     = softmax(Q_E K_{v+E}^T * scale)       over visual and elite keys alone
    I_i   = mean over q in E of A_q,i            i visual
    s_t   = sum over i of I_i                    strength
    s_k   = n / ((n - 1)(n - 2)) sum over i of ((I_i - mean) / std)^3      skewness; n visual tokens
    r_l   = (s_t' + s_k') / 2 * r                s': normalised over the layers

Layer l keeps the r_l n visual tokens with the greatest I_i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..methods.kept_rows import PER_HEAD_PADDING, gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.ratios import check_ratio, proportional
from ..methods.shared_budget import SharedBudget
from .attention_scores import attention_chunks, behind_last_image
from .base import Policy
from .budgets import best_tokens, last_tokens, layer_counts


class EliteAttention(NamedTuple):
    """What is measured of one layer before the budgets are known."""

    importance: torch.Tensor
    """[B, N]: I; 0 but at visual tokens."""
    strength: torch.Tensor
    """[B]."""
    skewness: torch.Tensor
    """[B]."""


@dataclass(frozen=True)
class AirCache(SharedBudget[EliteAttention], Policy):
    """Keeps all text, and of all visual tokens of a row together those with the greatest importance, raw and at their
    positions.

    Once, as prefill ends; what is not kept is dropped, not merged. Chosen here, as the paper leaves it open and there
    is no code of its authors:

    - The elite is of the text behind the last image: text before an image has not seen it, and the prompt's first
      token, on which much attention rests, would often be the only one. Rows without text behind an image take all
      text, rows without any their last token.
    - An elite token attends to visual and elite keys before and behind it, as the formula says; the model is causal.
    - Attention is averaged over all heads, which keep the same tokens, as the formulas have no head's index.
    - s' = L s / sum of s over the L layers, so that the mean of r_l is r; a negative skewness (a tail of tokens with
      little attention) counts as 0. What a layer cannot take beyond all its tokens goes to the others.

    Rows of a batch have budgets of their own. In a later turn all of it is of the turn's own tokens. Keys and values of
    all layers are held until the last has run.
    """

    reads_question = True
    budget_field = "retention"
    compresses_text = False

    retention: float
    """r: kept visual tokens / visual tokens, the mean over the layers; the paper's headline is 0.1."""
    alpha: float = 0.9
    """Attention of the last text token, as a share of its greatest, that makes a text token one of the elite."""

    def __post_init__(self) -> None:
        check_ratio(self.retention)
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"alpha {self.alpha} is outside (0, 1]: it is a share of the greatest attention, 1 leaves its token"
                " alone."
            )

    def observe(self, prefill: LayerPrefill) -> EliteAttention:
        visual = prefill.visual()
        importance = self.importance(prefill, self.elite(prefill), visual)
        return EliteAttention(importance, importance.sum(dim=1), skewness(importance, visual))

    def elite(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, N] bool: E."""
        text = _ranking_text(prefill)
        attention = torch.zeros(text.shape, device=text.device)
        # Rows whose text ends elsewhere have no weights in a chunk.
        for chunk in attention_chunks(prefill, last_tokens(text, 1), text, False, "the last that ranks"):
            attention = attention + chunk.weights.mean(dim=(1, 2)).sum(dim=1)
        return text & (attention >= self.alpha * attention.amax(dim=1, keepdim=True))

    def importance(self, prefill: LayerPrefill, elite: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """[B, N]: I, with softmax over visual and elite keys alone."""
        received = torch.zeros(visual.shape, device=visual.device)
        for chunk in attention_chunks(prefill, elite, visual | elite, causal=False):
            received = received + chunk.weights.mean(dim=(1, 2)).sum(dim=1)
        return received / elite.sum(dim=1, keepdim=True) * visual

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[EliteAttention]) -> list[Compressed]:
        _, strengths, skews = zip(*observations, strict=True)
        strength_BL, skew_BL = torch.stack([torch.stack(of, dim=1) for of in (strengths, skews)]).tolist()
        visual, tokens = prefills[0].visual(), [0] * len(prefills[0].valid)
        for span in prefills[0].spans:
            tokens[span.row] += span.length
        counts_LB = zip(*map(self.counts, strength_BL, skew_BL, tokens), strict=True)
        compressed = []
        for prefill, observation, counts in zip(prefills, observations, counts_LB, strict=True):
            kept = best_tokens(observation.importance, visual, torch.tensor(counts, device=visual.device))
            text = gather_kept(prefill, prefill.valid & ~visual, alike="text")
            compressed.append(Compressed(gather_kept(prefill, kept, PER_HEAD_PADDING), text))
        return compressed

    def counts(self, strength: Sequence[float], skew: Sequence[float], tokens: int) -> list[int]:
        """Kept visual tokens of each layer of one row, of `tokens` that there are."""
        weights = [sum(both) / 2 for both in zip(layer_shares(strength), layer_shares(skew), strict=True)]
        return layer_counts(proportional(weights, self.retention * len(weights), 0.0, 1.0), tokens)


def layer_shares(measure: Sequence[float]) -> list[float]:
    """s': of mean 1 over the layers, negative ones as 0; all 1 where no layer has any."""
    positive = [max(0.0, value) for value in measure]
    total = sum(positive)
    return [len(positive) * value / total if total > 0 else 1.0 for value in positive]


def _ranking_text(prefill: LayerPrefill) -> torch.Tensor:
    """[B, N] bool: the text whose tokens can be elite."""
    text = prefill.valid & ~prefill.visual()
    text = torch.where(text.any(dim=1, keepdim=True), text, last_tokens(prefill.valid, 1))
    behind = behind_last_image(prefill)
    return torch.where(behind.any(dim=1, keepdim=True), behind, text)


def skewness(importance_BN: torch.Tensor, visual_BN: torch.Tensor) -> torch.Tensor:
    """[B]: sample skewness over the visual tokens, std with n - 1; 0 for fewer than three or for equal ones."""
    n = visual_BN.sum(dim=1).to(importance_BN.dtype)
    mean = (importance_BN * visual_BN).sum(dim=1) / n.clamp_min(1)
    away = (importance_BN - mean[:, None]) * visual_BN
    deviation = (away.square().sum(dim=1) / (n - 1).clamp_min(1)).sqrt()
    standard = away / deviation[:, None].clamp_min(torch.finfo(importance_BN.dtype).tiny)
    skew: torch.Tensor = n / ((n - 1) * (n - 2)).clamp_min(1) * standard.pow(3).sum(dim=1)
    return skew.masked_fill((n < 3) | (deviation == 0), 0.0)
