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

from ..errors import ConfigError
from ..methods.kept_rows import PER_HEAD_PADDING, gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.ratios import check_budget
from ..methods.shared_budget import SharedBudget
from .attention_scores import attention_chunks
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
        rows, attended = _attention(prefill, ranking)
        weights = _text_weights(rows, ranking)
        scores = torch.where(visual, (weights[:, None] @ rows)[:, 0], attended)
        return TextGuide(scores, (rows.sum(dim=1) * visual).sum(dim=1))

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[TextGuide]) -> list[Compressed]:
        valid, visual = prefills[0].valid, prefills[0].visual()
        strength_BL = torch.stack([o.strength for o in observations], dim=1).tolist()
        counts_LB = zip(*map(self.counts, strength_BL, valid.sum(dim=1).tolist()), strict=True)
        always = (valid & (valid.cumsum(dim=1) <= self.sinks)) | last_tokens(valid, 1)
        compressed = []
        for prefill, observation, counts in zip(prefills, observations, counts_LB, strict=True):
            # Attention is at most the number of queries: text with this much more comes before all visual tokens.
            ranked = observation.scores + (valid.shape[1] + 1) * (valid & ~visual)
            kept = best_tokens(ranked, valid, torch.tensor(counts, device=valid.device), always)
            parts = (kept & visual, kept & ~visual)
            compressed.append(Compressed(*(gather_kept(prefill, part, PER_HEAD_PADDING) for part in parts)))
        return compressed

    def counts(self, strength: Sequence[float], tokens: int) -> list[int]:
        """k of each layer for one row, of `tokens` that there are."""
        least = min(tokens, self.sinks + 1)
        return share_out(strength, least, tokens, round(self.budget * len(strength) * tokens))


def _attention(prefill: LayerPrefill, ranking: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the heads of the attention of the ranking queries, a row of it for each token ([B, N, N] without the
    rows of tokens that rank in no batch row: [B, P, N]), and what each token gets from all queries, [B, N]."""
    batch, tokens = ranking.shape
    selected = ranking.any(dim=0)
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    rows = torch.zeros(batch, int(selected.sum()), tokens, dtype=work, device=ranking.device)
    attended = torch.zeros(batch, tokens, dtype=work, device=ranking.device)
    begin = 0
    for chunk in attention_chunks(prefill, prefill.valid):
        weights = chunk.weights.mean(dim=(1, 2))
        attended[:, : weights.shape[2]] += weights.sum(dim=1)
        of_text = weights[:, selected[chunk.queries]]
        end = begin + of_text.shape[1]
        rows[:, begin:end, : weights.shape[2]] = of_text * ranking[:, selected][:, begin:end, None]
        begin = end
    return rows, attended


def _text_weights(rows_BPN: torch.Tensor, ranking: torch.Tensor) -> torch.Tensor:
    """[B, P]: w of the tokens that rank, 0 where one ranks in another batch row alone."""
    selected = ranking.any(dim=0)
    among = ranking[:, selected]
    behind = among.flip(1).cumsum(dim=1).flip(1)
    received = rows_BPN[:, :, selected].sum(dim=1)
    return received / behind.clamp_min(1) * among
