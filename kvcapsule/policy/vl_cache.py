"""VL-Cache (arXiv 2410.23317): layers share a budget by how sparse they attend; tokens are ranked by the text behind
the last image.

    beta_l = clip((1 - gamma_l) / sum over layers of (1 - gamma) * alpha * L, 0.01, 1)      gamma_l: sparsity of layer l
                                                                                            (postvision)
    k_l    = beta_l m                                                                       m: tokens of the prompt

Of a layer's k_l tokens a tenth are the last ones; the others are those with the greatest s_j (postvision), text and
visual in one ranking.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..codec.kvcapsule import retained
from ..methods.kept_rows import UNEVEN, keep, keep_heads
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.shared_budget import SharedBudget
from .base import Policy
from .budgets import OVERFLOWS, best_tokens, check_choice, last_tokens, layer_shares, whole_counts
from .postvision import THRESHOLD, WINDOW, attention_of, ranking_queries

SETS = ("layer", "head")
GROUPS = ("sum", "max")
QUERIES = ("post-vision", "last")
RECENT_OF = ("layer", "mean")
SCOPES = ("all", "text")


class RankedTokens(NamedTuple):
    """What is known of one layer when the budgets are shared out."""

    scores: torch.Tensor
    """[B, R, N]: of the tokens that are held, for R = 1 set or one for each KV head."""
    sparsity: torch.Tensor
    """[B]."""


@dataclass(frozen=True)
class VLCache(SharedBudget[RankedTokens], Policy):
    """Keeps a share of the prompt's tokens, raw and at their positions, once, as prefill ends; what is written
    afterwards is kept.

    The paper leaves open what the settings from `sets` on say. Rows of a batch have budgets of their own; fractions of
    a token are added up over the layers (whole_counts), so that little budgets are met, too. In a later turn all of it
    is of the turn's own tokens. Keys and values of all layers are held until the last has run; with scope "text" only
    those of the text.
    """

    budget_field = "budget"

    budget: float
    """alpha: kept tokens / prompt tokens, the mean over the layers; the paper's headline is 0.1. Layers that the clip
    holds back make it less (see `overflow`); at 1 all is kept."""
    threshold: float = THRESHOLD
    """p: attention below this share of a query's greatest counts as zero where sparsity is measured; scores sum all of
    it."""
    recent: float = 0.1
    """Share of a layer's budget that its last tokens take; 0: none."""
    least: float = 0.01
    """Least share of its tokens that a layer keeps."""
    queries: str = "post-vision"
    """Who ranks: "post-vision", the text behind the last image, or "last", the last `window` tokens, as in the paper's
    speed test."""
    window: int = WINDOW
    """Of queries "last", and of rows that have no image or no text behind it."""
    sets: str = "layer"
    """"layer": one set of tokens for all its KV heads, as nothing in the paper's formulas but the sparsity has a head's
    index; "head": each KV head its own, as many as the others."""
    group: str = "sum"
    """What a token is worth to a KV head: the "sum" (as s_j sums over queries) or the "max" over the query heads that
    share it; heads of a layer's one set are summed."""
    recent_of: str = "layer"
    """The budget that `recent` is a share of: the "layer"'s own, so that no more than this share of it is forced, or
    the "mean" over layers, the same number of tokens in all of them; the sparsity then shares out what is left."""
    overflow: str = "clip"
    """What a layer cannot take beyond all its tokens is not spent ("clip": the paper does not renormalise), or goes to
    the others ("share": what is stored is then the budget, and budgets near 1 near everything)."""
    scope: str = "all"
    """"all": text and visual tokens compete. "text": the same scores and sparsities prune the text, budgets are shares
    of its tokens and no visual token is stored: for Combined, beside a capsule."""

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget {self.budget} is outside (0, 1]: it is kept tokens / prompt tokens, 1 keeps all.")
        if not 0 <= self.least <= self.budget:
            raise ValueError(
                f"least {self.least} is what every layer keeps: it is from 0 to the budget, {self.budget}."
            )
        if not 0 <= self.threshold <= 1 or not 0 <= self.recent <= 1:
            raise ValueError(f"threshold {self.threshold} and recent {self.recent} are shares: from 0 to 1.")
        if self.window < 1:
            raise ValueError(f"window {self.window}: at least one query has to rank.")
        for name, choices in (
            ("queries", QUERIES),
            ("sets", SETS),
            ("group", GROUPS),
            ("recent_of", RECENT_OF),
            ("overflow", OVERFLOWS),
            ("scope", SCOPES),
        ):
            check_choice(name, getattr(self, name), choices)

    def observe(self, prefill: LayerPrefill) -> RankedTokens:
        queries = ranking_queries(prefill, self.window, self.queries == "post-vision")
        attention = attention_of(prefill, queries, self.threshold)
        scores = attention.received.sum(dim=2) if self.group == "sum" else attention.received.amax(dim=2)
        if self.sets == "layer":
            scores = scores.sum(dim=1, keepdim=True)
        if self.scope == "text":
            scores = scores.gather(2, _text_last(prefill)[:, None].expand(-1, scores.shape[1], -1))
        return RankedTokens(scores, attention.sparsity)

    def retain(self, prefill: LayerPrefill) -> LayerPrefill:
        return _text_alone(prefill) if self.scope == "text" else prefill.without_queries()

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[RankedTokens]) -> list[Compressed]:
        sparsity_BL = torch.stack([o.sparsity for o in observations], dim=1).tolist()
        tokens_B = prefills[0].valid.sum(dim=1).tolist()
        counts_LB = zip(*map(self.counts, sparsity_BL, tokens_B), strict=True)
        return [self._keep(p, o.scores, counts) for p, o, counts in zip(prefills, observations, counts_LB, strict=True)]

    def counts(self, sparsity: Sequence[float], tokens: int) -> list[int]:
        """k of each layer for one row, of `tokens` that there are."""
        fixed = self.recent * self.budget if self.recent_of == "mean" else 0.0
        least = self.least * (1 - fixed / self.budget)
        shares = layer_shares([1 - gamma for gamma in sparsity], self.budget - fixed, least, 1 - fixed, self.overflow)
        return whole_counts([fixed + share for share in shares], tokens)

    def _keep(self, prefill: LayerPrefill, scores: torch.Tensor, counts: Sequence[int]) -> Compressed:
        tokens = prefill.valid.sum(dim=1).tolist()
        of = counts if self.recent_of == "layer" else [round(self.budget * n) for n in tokens]
        recents = [
            min(k, retained(self.recent, n)) if self.recent and k else 0 for k, n in zip(counts, of, strict=True)
        ]
        device = scores.device
        recent = last_tokens(prefill.valid, torch.tensor(recents, device=device)[:, None])
        kept = best_tokens(scores, prefill.valid, torch.tensor(counts, device=device), recent)
        visual = prefill.visual()
        if self.sets == "layer":
            return Compressed(keep(prefill, kept[:, 0] & visual, UNEVEN), keep(prefill, kept[:, 0] & ~visual, UNEVEN))
        return Compressed(keep_heads(prefill, kept & visual[:, None]), keep_heads(prefill, kept & ~visual[:, None]))


def _text_last(prefill: LayerPrefill) -> torch.Tensor:
    """[B, most text tokens of a row]: places of a row's text in their order, at the end; before them, in shorter rows,
    places of others."""
    text = prefill.valid & ~prefill.visual()
    order = torch.sort(text.to(torch.int8), dim=1, stable=True).indices
    return order[:, text.shape[1] - int(text.sum(dim=1).max()) :]


def _text_alone(prefill: LayerPrefill) -> LayerPrefill:
    """The text as if there were nothing else, left-padded, without queries."""
    places = _text_last(prefill)
    keys, values = (
        x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        for x in (prefill.keys, prefill.values)
    )
    valid = (prefill.valid & ~prefill.visual()).gather(1, places)
    short = replace(prefill, keys=keys, values=values, valid=valid, spans=[], position_embeddings=None, shared={})
    return short.without_queries()
