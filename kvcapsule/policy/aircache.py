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

from ..codec.kvcapsule import check_ratio
from ..methods.kept_rows import UNEVEN, keep, keep_heads
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.shared_budget import SharedBudget
from .base import Policy
from .budgets import OVERFLOWS, best_tokens, check_choice, last_tokens, layer_shares, whole_counts
from .postvision import behind_last_image

TEXTS = ("behind", "all")
HEADS = ("mean", "each")
MEASURES = ("both", "strength", "skewness", "uniform")
NORMALISATIONS = ("share", "softmax")
NEGATIVES = ("zero", "shift")
_CHUNK = 256
"""Elite queries whose attention is computed at once."""


class EliteAttention(NamedTuple):
    """What is known of one layer when the budgets are shared out."""

    importance: torch.Tensor
    """[B, R, N]: I, for R = 1 set of tokens or one for each KV head; 0 but at visual tokens."""
    strength: torch.Tensor
    """[B]."""
    skewness: torch.Tensor
    """[B]."""


@dataclass(frozen=True)
class AirCache(SharedBudget[EliteAttention], Policy):
    """Keeps all text, and of all visual tokens of a row together those with the greatest importance, raw and at their
    positions.

    Once, as prefill ends; what is not kept is dropped, not merged. The paper leaves open what the settings from `text`
    on say, and there is no code of its authors; rows of a batch have budgets of their own. In a later turn all of it is
    of the turn's own tokens. Keys and values of all layers are held until the last has run.
    """

    budget_field = "retention"
    compresses_text = False

    retention: float
    """r: kept visual tokens / visual tokens, the mean over the layers; the paper's headline is 0.1."""
    alpha: float = 0.9
    """Attention of the last text token, as a share of its greatest, that makes a text token one of the elite."""
    measure: str = "both"
    """What layers share the budget by: "both", or one of the paper's ablations, "strength", "skewness" and
    "uniform"."""
    text: str = "behind"
    """Which tokens can be elite: the text "behind" the last image, as what stands before an image has not seen it, and
    the prompt's first token, on which much attention rests, would often be the only one; or "all" text. Rows without
    text behind an image take all text, rows without any their last token."""
    causal: bool = False
    """Whether an elite token sees only what is before it, as in the model; the paper's formula does not say so. With
    text "behind" only elite keys are concerned."""
    heads: str = "mean"
    """"mean": attention is averaged over all heads, and they keep the same tokens, as the formulas have no head's
    index; "each": averaged over the query heads that share a KV head, which has an elite and tokens of its own, as many
    as the others."""
    normalisation: str = "share"
    """s' = "share": L s / sum of s, so that the mean of r_l is r; "softmax": L softmax(s)."""
    negative: str = "zero"
    """A skewness below 0 (a tail of little looked at tokens) is taken as "zero", the layer with least need of a choice;
    or "shift": where there is one, all layers' are raised until the least is 0. Not read with "softmax"."""
    overflow: str = "share"
    """What a layer cannot take beyond all its tokens goes to the others ("share": what is stored is then the budget) or
    is not spent ("clip")."""

    def __post_init__(self) -> None:
        check_ratio(self.retention)
        if not 0 < self.alpha <= 1:
            raise ValueError(
                f"alpha {self.alpha} is outside (0, 1]: it is a share of the greatest attention, 1 leaves its token"
                " alone."
            )
        for name, choices in (
            ("measure", MEASURES),
            ("text", TEXTS),
            ("heads", HEADS),
            ("normalisation", NORMALISATIONS),
            ("negative", NEGATIVES),
            ("overflow", OVERFLOWS),
        ):
            check_choice(name, getattr(self, name), choices)

    def observe(self, prefill: LayerPrefill) -> EliteAttention:
        visual = prefill.visual()
        elite = self.elite(prefill)
        importance = self.importance(prefill, elite, visual)
        return EliteAttention(importance, importance.sum(dim=2).mean(dim=1), skewness(importance, visual).mean(dim=1))

    def elite(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, R, N] bool: E."""
        text = self._text(prefill)
        last = text.shape[1] - 1 - text.flip(1).to(torch.int8).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        logits = _logits(prefill, prefill.query[rows, :, last][:, :, None])
        attention = self._over_heads(logits.masked_fill(~text[:, None, None, None], -torch.inf).softmax(dim=-1))[
            :, :, 0
        ]
        return text[:, None] & (attention >= self.alpha * attention.amax(dim=-1, keepdim=True))

    def importance(self, prefill: LayerPrefill, elite: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """[B, R, N]: I, with softmax over visual and elite keys alone; of no other queries than the elite, a chunk of
        them at a time."""
        tokens = visual.shape[1]
        heads = prefill.keys.shape[1]
        keys = (visual[:, None] | elite).expand(-1, heads, -1)
        found = torch.zeros_like(elite, dtype=torch.promote_types(prefill.keys.dtype, torch.float32))
        positions = torch.arange(tokens, device=visual.device)
        for chunk in elite.any(dim=(0, 1)).nonzero()[:, 0].split(_CHUNK):
            asks = elite[:, :, chunk]
            seen = keys[:, :, None] & (positions <= chunk[:, None]) if self.causal else keys[:, :, None]
            hidden = ~seen[:, :, None]
            logits = _logits(prefill, prefill.query[:, :, chunk])
            attention = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1)
            found += (self._over_heads(attention) * asks[..., None]).sum(dim=2)
        return found / elite.sum(dim=2, keepdim=True) * visual[:, None]

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[EliteAttention]) -> list[Compressed]:
        _, strengths, skews = zip(*observations, strict=True)
        strength_BL, skew_BL = torch.stack(strengths, dim=1).tolist(), torch.stack(skews, dim=1).tolist()
        tokens_B = prefills[0].visual().sum(dim=1).tolist()
        counts_LB = zip(*map(self.counts, strength_BL, skew_BL, tokens_B), strict=True)
        return [
            self._keep(p, o.importance, counts) for p, o, counts in zip(prefills, observations, counts_LB, strict=True)
        ]

    def counts(self, strength: Sequence[float], skew: Sequence[float], tokens: int) -> list[int]:
        """Kept visual tokens of each layer of one row, of `tokens` that there are."""
        if self.measure == "uniform":
            weights = [1.0] * len(strength)
        else:
            measures = {"both": (strength, skew), "strength": (strength,), "skewness": (skew,)}[self.measure]
            weights = [sum(layer) / len(measures) for layer in zip(*map(self.normalised, measures), strict=True)]
        return whole_counts(layer_shares(weights, self.retention, 0.0, 1.0, self.overflow), tokens)

    def normalised(self, measure: Sequence[float]) -> list[float]:
        """s': of mean 1 over the layers; all 1 where no layer has any."""
        values = torch.tensor(measure, dtype=torch.float64)
        if self.normalisation == "softmax":
            values = values.softmax(dim=0)
        else:
            values = values.clamp_min(0) if self.negative == "zero" else values - values.min().clamp_max(0)
        total = values.sum()
        scaled: list[float] = (values * len(measure) / total if total > 0 else torch.ones_like(values)).tolist()
        return scaled

    def _keep(self, prefill: LayerPrefill, importance: torch.Tensor, counts: Sequence[int]) -> Compressed:
        visual = prefill.visual()
        kept = best_tokens(importance, visual, torch.tensor(counts, device=visual.device))
        text = keep(prefill, prefill.valid & ~visual)
        return Compressed(
            keep(prefill, kept[:, 0], UNEVEN) if self.heads == "mean" else keep_heads(prefill, kept), text
        )

    def _text(self, prefill: LayerPrefill) -> torch.Tensor:
        text = prefill.valid & ~prefill.visual()
        text = torch.where(text.any(dim=1, keepdim=True), text, last_tokens(prefill.valid, 1))
        behind = behind_last_image(prefill)
        return torch.where(behind.any(dim=1, keepdim=True), behind, text) if self.text == "behind" else text

    def _over_heads(self, x_BHGQN: torch.Tensor) -> torch.Tensor:
        """[B, R, Q, N]."""
        x_BHQN = x_BHGQN.mean(dim=2)
        return x_BHQN.mean(dim=1, keepdim=True) if self.heads == "mean" else x_BHQN


def _logits(prefill: LayerPrefill, query: torch.Tensor) -> torch.Tensor:
    """[B, H, G, Q, N] in fp32 at least."""
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    keys = prefill.keys.to(work)[:, :, None]
    logits: torch.Tensor = query.unflatten(1, (keys.shape[1], -1)).to(work) @ keys.transpose(-1, -2) * prefill.scale
    return logits


def skewness(importance: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[B, R]: sample skewness of importance [B, R, N] over the visual tokens, std with n - 1; 0 for fewer than three or
    for equal ones."""
    n = visual.sum(dim=1, keepdim=True).to(importance.dtype)
    mean = (importance * visual[:, None]).sum(dim=2) / n.clamp_min(1)
    away = (importance - mean[..., None]) * visual[:, None]
    deviation = (away.square().sum(dim=2) / (n - 1).clamp_min(1)).sqrt()
    standard = away / deviation[..., None].clamp_min(torch.finfo(importance.dtype).tiny)
    skew: torch.Tensor = n / ((n - 1) * (n - 2)).clamp_min(1) * standard.pow(3).sum(dim=2)
    return skew.masked_fill((n < 3) | (deviation == 0), 0.0)
