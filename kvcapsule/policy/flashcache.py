"""FlashCache (arXiv 2511.16786): keeps the tokens that deviate most from the smooth part of their image's keys and
values; no attention is computed.

    C     = the first `passed` n rows of the DCT-II matrix [n, n] of a span of n tokens, orthonormal
    X~    = C^T C X                                        low-pass of the keys, and of the values, along the tokens
    o_j   = |k_j - k~_j|^2 / sum_i |k_i|^2 + |v_j - v~_j|^2 / sum_i |v_i|^2           all KV heads together
    e_l   = sum over the visual tokens of o_j              energy of layer l beyond the filter

Layer l keeps retention n L e_l / sum over layers of e of its visual tokens, those with the greatest o.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..methods.kept_rows import PER_HEAD_PADDING, gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.ratios import check_ratio, proportional
from ..methods.shared_budget import SharedBudget
from .base import Policy
from .budgets import best_tokens, layer_counts

PASSED = 0.1
"""Share of the frequencies that pass; chosen here, as the paper's value was not to be had."""


@dataclass(frozen=True)
class FlashCache(SharedBudget[torch.Tensor], Policy):
    """Keeps all text, and of all visual tokens of a row together those with the greatest o, raw and at their positions.

    There is no code of its authors. Chosen here: the filter runs along each visual span by itself, over keys as they
    are cached (rotated); keys and values count as shares of their own energy, so that neither their units nor a layer's
    decide; all KV heads keep the same tokens; what a layer cannot take beyond all its tokens goes to the others. It
    does not depend on any query, so it keeps the same tokens whatever is asked. Keys and values of all layers are held
    until the last has run.
    """

    budget_field = "retention"
    compresses_text = False

    retention: float
    """Kept visual tokens / visual tokens, the mean over the layers; the paper's headline is 0.2."""
    passed: float = PASSED
    """Share of the frequencies that pass the filter, the lowest ones; at least one passes."""

    def __post_init__(self) -> None:
        check_ratio(self.retention)
        check_ratio(self.passed, "share of frequencies that pass")

    def observe(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, N]: o of visual tokens, 0 elsewhere."""
        work = torch.promote_types(prefill.keys.dtype, torch.float32)
        outlying = torch.zeros(prefill.valid.shape, dtype=work, device=prefill.keys.device)
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            parts = (x[span.row, :, run].to(work) for x in (prefill.keys, prefill.values))
            outlying[span.row, run] = sum(beyond_filter(x, self.passed) for x in parts)
        return outlying

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[torch.Tensor]) -> list[Compressed]:
        visual = prefills[0].visual()
        energy_BL = torch.stack([o.sum(dim=1) for o in observations], dim=1).tolist()
        counts_LB = zip(*map(self.counts, energy_BL, visual.sum(dim=1).tolist()), strict=True)
        compressed = []
        for prefill, outlying, counts in zip(prefills, observations, counts_LB, strict=True):
            kept = best_tokens(outlying, visual, torch.tensor(counts, device=visual.device))
            text = gather_kept(prefill, prefill.valid & ~visual)
            compressed.append(Compressed(gather_kept(prefill, kept, PER_HEAD_PADDING), text))
        return compressed

    def counts(self, energy: Sequence[float], tokens: int) -> list[int]:
        """Kept visual tokens of each layer of one row, of `tokens` that there are."""
        return layer_counts(proportional(energy, self.retention * len(energy), 0.0, 1.0), tokens)


def beyond_filter(x_HTD: torch.Tensor, passed: float) -> torch.Tensor:
    """[T]: each token's squared deviation from the low-pass of x along the tokens, as a share of the energy of x."""
    basis = cosines(x_HTD.shape[1], passed, x_HTD.dtype, x_HTD.device)
    rest = x_HTD - basis.T @ (basis @ x_HTD)
    share: torch.Tensor = rest.square().sum(dim=(0, 2)) / x_HTD.square().sum().clamp_min(torch.finfo(x_HTD.dtype).tiny)
    return share


@lru_cache(maxsize=8)
def cosines(tokens: int, passed: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """C [frequencies, tokens]. All callers share the tensor, so it must not be written to."""
    with torch.inference_mode(False):
        frequency = torch.arange(max(1, round(passed * tokens)), dtype=torch.float64)[:, None]
        angles = (torch.arange(tokens, dtype=torch.float64) + 0.5) * frequency * (math.pi / tokens)
        basis: torch.Tensor = angles.cos() * (2 / tokens) ** 0.5
        basis[0] *= 0.5**0.5
        return basis.to(device, dtype)
