"""LOOK-M (arXiv 2406.18139): text first, and what is evicted of the images is merged into the tokens that stay.

    kept of n prompt tokens      the last m, and the best k of those before, any text before any visual token;  m + k =
                                 budget n
    score of token j, KV head h  sum over all prompt queries i >= j and the head's query heads of A_ij, the causal
                                 softmax
    an evicted visual token e    goes to the kept token c(e) whose key is nearest, by the cosine
    averaged                     k_c = (k_c + sum_e k_e) / (1 + n_c)             over the n_c tokens that went to c;
                                 values likewise
    pivotal                      k_c = (k_c + sum_e (k_e + k_c) / 2) / (1 + n_c)
    weighted                     k_c = (k_c + sum_e cos(k_e, k_c) k_e) / (1 + n_c)

What is kept, and what goes where, is each KV head's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..methods.kept_rows import gather_kept_per_head
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.ratios import check_budget
from .attention_scores import attention_received
from .base import Policy

MERGES = ("averaged", "pivotal", "weighted", "none")
_CHUNK = 256
"""Evicted tokens that are compared with the kept ones at once."""


@dataclass(frozen=True)
class LookM(Policy):
    """Each KV head keeps round(budget n) of a row's n prompt tokens, its own; text and visual tokens share the budget,
    text has priority.

    The defaults are those of the authors' scripts: half of the budget is recent tokens, evicted ones are merged into
    pivots. Chosen here: query heads that share a KV head are summed; keys are merged as they are, rotated, as the
    authors do; evicted text (where the budget is smaller than the text) is dropped, not merged; a row keeps one token
    at least. In a later turn all this is among the turn's own tokens.
    """

    reads_question = True
    budget_field = "budget"
    separable = False
    """Evicted visual tokens are merged into text, too."""

    budget: float
    """Kept tokens / prompt tokens, in (0, 1]."""
    recent: float = 0.5
    """Share of the budget that is the prompt's last tokens, in [0, 1]."""
    merge: str = "pivotal"
    """"averaged", "pivotal", "weighted", or "none": evicted tokens are dropped."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not 0 <= self.recent <= 1:
            raise ConfigError(f"recent {self.recent} is a share of the budget: 0 to 1.")
        if self.merge not in MERGES:
            raise ConfigError(f"merge {self.merge!r} is none of {', '.join(map(repr, MERGES))}.")

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        kept = self.kept(prefill)
        visual = prefill.visual()[:, None]
        images, text, evicted = kept & visual, kept & ~visual, visual & ~kept
        of_images, of_text, lost = torch.stack([x.sum(dim=2) for x in (images, text, evicted)]).tolist()
        if self.merge != "none":
            # Every head of a row keeps and evicts as many.
            counts = [(a[0] + b[0], c[0]) for a, b, c in zip(of_images, of_text, lost, strict=True)]
            prefill = self.merged(prefill, kept, evicted, counts)
        return Compressed(
            gather_kept_per_head(prefill, images, of_images), gather_kept_per_head(prefill, text, of_text)
        )

    def kept(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, H, N] bool: what each head keeps."""
        valid, counts = prefill.valid, prefill.valid.sum(dim=1)
        tokens = prefill.tokens()
        total = torch.tensor([max(1, round(self.budget * n)) if n else 0 for n in tokens])
        total = total.to(valid.device, non_blocking=True)
        recent = (self.recent * total).round().long()
        place = valid.cumsum(dim=1)
        last = valid & (place > (counts - recent)[:, None])
        scores = attention_received(prefill, 0)
        # One ranking: recent tokens, then text, then visual tokens, then padding, each by its scores.
        order = torch.where(last, 3, torch.where(valid & ~prefill.visual(), 2, torch.where(valid, 1, 0)))[
            :, None
        ].expand(scores.shape)
        by_score = scores.argsort(dim=2, descending=True, stable=True)
        ranked = by_score.gather(2, order.gather(2, by_score).argsort(dim=2, descending=True, stable=True))
        first = torch.arange(valid.shape[1], device=valid.device) < total[:, None, None]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(2, ranked, first.expand(scores.shape))

    def merged(
        self,
        prefill: LayerPrefill,
        kept_BHN: torch.Tensor,
        evicted_BHN: torch.Tensor,
        counts: Sequence[tuple[int, int]],
    ) -> LayerPrefill:
        """The prefill with every evicted token merged into the nearest of the kept ones; counts: of both for each row,
        the same in every head."""
        keys, values = prefill.keys.clone(), prefill.values.clone()
        both = (kept_BHN, evicted_BHN)
        for row, of_row in enumerate(counts):
            if not of_row[1]:
                continue
            kept, evicted = (
                torch.sort((~marked[row]).to(torch.int8), dim=1, stable=True).indices[:, :count, None]
                for marked, count in zip(both, of_row, strict=True)
            )
            likeness, target = _nearest(prefill.keys[row], kept, evicted)
            for x_BHND in (keys, values):
                index = kept.expand(-1, -1, x_BHND.shape[3])
                x_BHND[row] = x_BHND[row].scatter(1, index, self._centres(x_BHND[row], kept, evicted, likeness, target))
        return replace(prefill, keys=keys, values=values)

    def _centres(
        self,
        x_HND: torch.Tensor,
        kept: torch.Tensor,
        evicted: torch.Tensor,
        likeness: torch.Tensor,
        target: torch.Tensor,
    ) -> torch.Tensor:
        """The kept rows [H, K, D] after the evicted ones [H, E, D] went into those that `target` [H, E, 1] names."""
        work = torch.promote_types(x_HND.dtype, torch.float32)
        centre, other = (x_HND.to(work).take_along_dim(index, 1) for index in (kept, evicted))
        if self.merge == "pivotal":
            other = (other + centre.take_along_dim(target, 1)) / 2
        elif self.merge == "weighted":
            other = other * likeness
        count = torch.ones_like(kept, dtype=work).scatter_add(1, target, torch.ones_like(likeness))
        return (centre.scatter_add(1, target.expand_as(other), other) / count).to(x_HND.dtype)


def _nearest(keys_HND: torch.Tensor, kept: torch.Tensor, evicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine to the nearest kept key, and which of them it is, [H, E, 1] each."""
    unit = F.normalize(keys_HND.to(torch.promote_types(keys_HND.dtype, torch.float32)), dim=2)
    kept_keys = unit.take_along_dim(kept, 1).transpose(1, 2)
    nearest = [
        (unit.take_along_dim(part, 1) @ kept_keys).max(dim=2, keepdim=True) for part in evicted.split(_CHUNK, dim=1)
    ]
    return torch.cat([n.values for n in nearest], dim=1), torch.cat([n.indices for n in nearest], dim=1)
