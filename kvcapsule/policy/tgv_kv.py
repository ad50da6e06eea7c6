"""TGV-KV (arXiv 2606.03075): text ranks the visual tokens, each text token by how much the text itself attends to it.

    A      = mean over query heads of softmax(Q K^T * scale), causal       P: the prompt's tokens behind its last visual
             one; V: its visual tokens
    s_l    = sum over q in P, i in V of A_qi                               what layer l's text gives to the images
    k_l    = budget N L s_l / sum over layers of s                         N tokens, L layers; at most N
    w_j    = mean over the q in P at or behind j of A_qj                   weight of a text token j in P
    z_i    = sum over j in P of w_j A_ji                                   i visual
    t_j    = sum over all q of A_qj                                        j text

Of a layer's k_l tokens the prompt's first ones and its last are kept always, then text by its t, then visual tokens by
their z: text goes before the budget is spent on any image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..methods.kept_rows import PER_HEAD_PADDING, gather_apart
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.ratios import check_budget
from ..methods.shared_budget import SharedBudget
from .attention_scores import attention_chunks, attention_received
from .base import Policy
from .budgets import best_tokens, last_tokens, share_out
from .vl_cache import WINDOW, ranking_queries


class TextGuide(NamedTuple):
    """What is measured of one layer before the budgets are known."""

    scores: torch.Tensor
    """[B, N]: z of visual tokens, t of all others."""
    strength: torch.Tensor
    """[B]: s."""


@dataclass(frozen=True)
class TgvKV(SharedBudget[TextGuide], Policy):
    """Keeps a share of the prompt's tokens, raw and at their positions, once, as prefill ends; what is written
    afterwards is kept.

    Not here: the authors' code also drops one token a step while it writes, so that a layer's share of the growing
    sequence stays what it was. Their code is for one image and one sequence. Chosen here: a row of several images takes
    the text behind the last one; a row without text behind an image (the question asked later) is ranked by its last
    `window` tokens, in place of P; what a layer cannot take beyond all its tokens goes to the others, where the code
    does not spend it; every layer keeps the tokens that are kept always, at the cost of the others. All heads of a
    layer keep the same tokens. Keys and values of all layers are held until the last has run, and t asks for the scores
    of all prompt queries, computed anew. In a later turn all of it is of the turn's own tokens.
    """

    reads_question = True
    budget_field = "budget"

    budget: float
    """Kept tokens / prompt tokens, the mean over the layers; the paper's headline is 0.05."""
    sinks: int = 4
    """First tokens of the prompt that are always kept, beside its last one; 4 is the code's."""
    window: int = WINDOW
    """Last tokens that rank in rows that have no image or no text behind it."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.sinks < 0:
            raise ConfigError(f"sinks {self.sinks} count tokens: 0 or more.")
        if self.window < 1:
            raise ConfigError(f"window {self.window}: at least one token has to rank.")

    def observe(self, prefill: LayerPrefill) -> TextGuide:
        ranking, visual = ranking_queries(prefill, self.window), prefill.visual()
        queries, rows = _attention(prefill, ranking)
        weights = _text_weights(queries, rows, ranking)
        attended = attention_received(prefill, 0).sum(dim=1) / prefill.query.shape[1]
        scores = torch.where(visual, (weights[:, None] @ rows)[:, 0], attended)
        return TextGuide(scores, (rows.sum(dim=1) * visual).sum(dim=1))

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[TextGuide]) -> list[Compressed]:
        valid, visual = prefills[0].valid, prefills[0].visual()
        strength_BL = torch.stack([o.strength for o in observations], dim=1).tolist()
        counts_LB = zip(*map(self.counts, strength_BL, prefills[0].tokens()), strict=True)
        always = (valid & (valid.cumsum(dim=1) <= self.sinks)) | last_tokens(valid, 1)
        compressed = []
        for prefill, observation, counts in zip(prefills, observations, counts_LB, strict=True):
            # Attention is at most the number of queries: text with this much more comes before all visual tokens.
            ranked = observation.scores + (valid.shape[1] + 1) * (valid & ~visual)
            kept = best_tokens(ranked, valid, torch.tensor(counts, device=valid.device), always)
            compressed.append(Compressed(*gather_apart(prefill, (kept & visual, kept & ~visual), PER_HEAD_PADDING)))
        return compressed

    def counts(self, strength: Sequence[float], tokens: int) -> list[int]:
        """k of each layer for one row, of `tokens` that there are."""
        least = min(tokens, self.sinks + 1)
        return share_out(strength, least, tokens, round(self.budget * len(strength) * tokens))


def _attention(prefill: LayerPrefill, ranking: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [P] of the tokens that rank in some batch row, and the mean over the heads of their attention,
    [B, P, N]: 0 where one ranks in another batch row alone."""
    queries, rows = [], []
    for chunk in attention_chunks(prefill, ranking, alike="text that ranks"):
        weights = chunk.weights.mean(dim=(1, 2))
        queries.append(chunk.queries)
        rows.append(F.pad(weights, (0, ranking.shape[1] - weights.shape[2])))
    return torch.cat(queries), torch.cat(rows, dim=1)


def _text_weights(queries: torch.Tensor, rows_BPN: torch.Tensor, ranking: torch.Tensor) -> torch.Tensor:
    """[B, P]: w of the tokens that rank, 0 where one ranks in another batch row alone."""
    among = ranking[:, queries]
    behind = among.flip(1).cumsum(dim=1).flip(1)
    received = rows_BPN[:, :, queries].sum(dim=1)
    return received / behind.clamp_min(1) * among
