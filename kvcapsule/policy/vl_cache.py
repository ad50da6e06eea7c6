"""VL-Cache (arXiv 2410.23317): layers share a budget by how sparse they attend; tokens are ranked by the text behind
the last image.

    A      = softmax(Q_P K^T * scale), causal       P: the prompt's tokens behind its last visual one; Q_P: their
             queries, K: all keys
    gamma  = share of the A_qj, q in P, j <= q, with A_qj < p max_j A_qj      mean over query heads: a layer's sparsity
    s_j    = sum over q in P of A_qj
    beta_l = clip((1 - gamma_l) / sum over layers of (1 - gamma) * alpha * L, 0.01, 1)
    k_l    = beta_l m                               m: tokens of the prompt

Of a layer's k_l tokens a tenth are the last ones; the others are those with the greatest s_j, text and visual in one
ranking.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..methods.kept_rows import PER_HEAD_PADDING, gather_apart
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, Method
from ..methods.ratios import check_budget, retained
from ..methods.shared_budget import SharedBudget
from .attention_scores import attention_chunks, behind_last_image
from .base import Policy
from .budgets import best_tokens, last_tokens, layer_counts
from .full import Full

THRESHOLD = 0.01
"""The paper's p."""
WINDOW = 50
"""Last prompt tokens that take the place of P in the paper's speed test."""
SCOPES = ("all", "text")


class PostVision(NamedTuple):
    """Attention of the ranking queries."""

    received: torch.Tensor
    """[B, H, G, N]: what each token gets from each query head, summed over the queries of P."""
    sparsity: torch.Tensor
    """[B]: gamma."""


def ranking_queries(prefill: LayerPrefill, window: int = WINDOW) -> torch.Tensor:
    """[B, N] bool: the queries P; in a row without text behind an image, the row's last `window` tokens."""
    behind = behind_last_image(prefill)
    return torch.where(behind.any(dim=1, keepdim=True), behind, last_tokens(prefill.valid, window))


def attention_of(prefill: LayerPrefill, queries_BN: torch.Tensor, threshold: float = THRESHOLD) -> PostVision:
    """The causal attention of the marked tokens."""
    batch, heads, tokens, _ = prefill.keys.shape
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    device = prefill.keys.device
    received = torch.zeros(batch, heads, prefill.query.shape[1] // heads, tokens, dtype=work, device=device)
    dense = torch.zeros(batch, dtype=torch.int64, device=device)
    visible = torch.zeros_like(dense)
    for chunk in attention_chunks(prefill, queries_BN, alike="the text that ranks"):
        received[..., : chunk.weights.shape[4]] += chunk.weights.sum(dim=3)
        above = chunk.weights >= threshold * chunk.weights.amax(dim=-1, keepdim=True)
        dense += (above & chunk.visible[:, None, None]).sum(dim=(1, 2, 3, 4))
        visible += chunk.visible.sum(dim=(1, 2))
    return PostVision(received, 1 - dense.to(work) / (prefill.query.shape[1] * visible).clamp_min(1))


class RankedTokens(NamedTuple):
    """What is measured of one layer before the budgets are known."""

    scores: torch.Tensor
    """[B, N]: s of the tokens that are held, summed over query heads."""
    sparsity: torch.Tensor
    """[B]."""


@dataclass(frozen=True)
class VLCache(SharedBudget[RankedTokens], Policy):
    """Keeps a share of the prompt's tokens, raw and at their positions, once, as prefill ends; what is written
    afterwards is kept.

    Chosen here: all heads of a layer keep the same tokens, as nothing in the paper's formulas but the sparsity has a
    head's index; a layer's last tokens are a tenth of its own budget; what a layer cannot take beyond all its tokens is
    not spent, as the paper does not renormalise. Rows of a batch have budgets of their own; fractions of a token are
    added up over the layers (layer_counts), so that small budgets are met. In a later turn the budget counts the turn's
    own tokens. Keys and values of all layers are held until the last has run; with scope "text" only those of
    the text.
    """

    reads_question = True
    budget_field = "budget"

    budget: float
    """alpha: kept tokens / prompt tokens, the mean over the layers; the paper's headline is 0.1. Where the clip
    bounds a layer, the mean is lower; at 1 all is kept."""
    threshold: float = THRESHOLD
    """p: attention below this share of a query's greatest counts as zero where sparsity is measured; scores sum all of
    it."""
    recent: float = 0.1
    """Share of a layer's budget that its last tokens take; 0: none."""
    least: float = 0.01
    """Least share of its tokens that a layer keeps."""
    window: int = WINDOW
    """Ranking queries, the last ones, in rows that have no image or no text behind it."""
    scope: str = "all"
    """"all": text and visual tokens compete. "text": the same scores and sparsities prune the text, budgets are shares
    of its tokens and no visual token is stored: for Combined, beside a capsule."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not 0 <= self.least <= self.budget:
            raise ConfigError(
                f"least {self.least} is what every layer keeps: it is from 0 to the budget, {self.budget}."
            )
        if not 0 <= self.threshold <= 1 or not 0 <= self.recent <= 1:
            raise ConfigError(f"threshold {self.threshold} and recent {self.recent} are shares: from 0 to 1.")
        if self.window < 1:
            raise ConfigError(f"window {self.window}: at least one query has to rank.")
        if self.scope not in SCOPES:
            raise ConfigError(f"scope {self.scope!r} is none of {', '.join(map(repr, SCOPES))}.")

    def observe(self, prefill: LayerPrefill) -> RankedTokens:
        attention = attention_of(prefill, ranking_queries(prefill, self.window), self.threshold)
        scores = attention.received.sum(dim=(1, 2))
        return RankedTokens(
            scores.gather(1, _text_last(prefill)) if self.scope == "text" else scores, attention.sparsity
        )

    def retain(self, prefill: LayerPrefill) -> LayerPrefill:
        return _text_alone(prefill) if self.scope == "text" else prefill.without_queries()

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[RankedTokens]) -> list[Compressed]:
        sparsity_BL = torch.stack([o.sparsity for o in observations], dim=1).tolist()
        tokens_B = prefills[0].tokens()
        counts_LB = zip(*map(self.counts, sparsity_BL, tokens_B), strict=True)
        layers = zip(prefills, observations, counts_LB, strict=True)
        return [self._keep(prefill, observation.scores, counts) for prefill, observation, counts in layers]

    def counts(self, sparsity: Sequence[float], tokens: int) -> list[int]:
        """k of each layer for one row, of `tokens` that there are."""
        return layer_counts(clipped_shares([1 - gamma for gamma in sparsity], self.budget, self.least), tokens)

    def _keep(self, prefill: LayerPrefill, scores_BN: torch.Tensor, counts: Sequence[int]) -> Compressed:
        recents = [min(k, retained(self.recent, k)) if self.recent and k else 0 for k in counts]
        device = scores_BN.device
        recent = last_tokens(prefill.valid, torch.tensor(recents, device=device)[:, None])
        kept = best_tokens(scores_BN, prefill.valid, torch.tensor(counts, device=device), recent)
        visual = prefill.visual()
        return Compressed(*gather_apart(prefill, (kept & visual, kept & ~visual), PER_HEAD_PADDING))


def clipped_shares(density: Sequence[float], mean: float, least: float) -> list[float]:
    """beta of each layer: in proportion to 1 - gamma, all of them 0 counting as equal; a mean of 1 gives every layer
    all, so that a budget of 1 is the full cache."""
    if mean >= 1:
        return [1.0] * len(density)
    total = sum(density)
    factor = mean * len(density) / total if total > 0 else 0.0
    return [min(1.0, max(least, factor * layer if total > 0 else mean)) for layer in density]


def _text_last(prefill: LayerPrefill) -> torch.Tensor:
    """[B, most text tokens of a row]: positions of a row's text in their order, at the end; before them, in shorter
    rows, positions of others."""
    text = prefill.valid & ~prefill.visual()
    order = torch.sort(text.to(torch.int8), dim=1, stable=True).indices
    return order[:, text.shape[1] - int(text.sum(dim=1).max()) :]


def _text_alone(prefill: LayerPrefill) -> LayerPrefill:
    """The text as if there were nothing else, left-padded, without queries."""
    positions = _text_last(prefill)
    keys, values = (
        x.gather(2, positions[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        for x in (prefill.keys, prefill.values)
    )
    valid = (prefill.valid & ~prefill.visual()).gather(1, positions)
    short = replace(prefill, keys=keys, values=values, valid=valid, spans=[], position_embeddings=None, shared={})
    return short.without_queries()


class SparsityMeter(Method):
    """The full cache; what it notes is how sparse each layer's attention was in the latest prefill.

        meter = SparsityMeter()
        with attach(model, meter):
            model.generate(**batch, max_new_tokens=1)
        meter.sparsity    # by layer: [B]

    Threshold as VLCache has it; the ranking queries are those of its defaults.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.threshold = threshold
        self.sparsity: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.sparsity[prefill.layer] = attention_of(prefill, ranking_queries(prefill), self.threshold).sparsity
        return Full().compress(prefill)
