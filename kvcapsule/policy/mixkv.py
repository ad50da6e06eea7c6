"""MixKV (arXiv 2510.20707): importance and diversity in one score, mixed by how alike the keys of a head are.

    a_j  = SnapKV's score of token j: attention of the last queries, pooled over its neighbours
    v_j  = |value_j|                     min-max normalised over the tokens, then scaled to the mean of a
    d_j  = -cos(key_j, m)                likewise;  m: mean of the n keys, each normalised
    s    = (n |m|^2 - 1) / (n - 1)       mean cosine of two different keys: how redundant the head is
    z_j  = s d_j + (1 - s) (a_j + v_j)

Each KV head keeps the tokens with the greatest z: as many as every head on SnapKV's budgets, or as many as AdaKV's
attention gives it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..methods.kept_rows import gather_kept_per_head
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.segment import Segment
from .adakv import AdaKV
from .base import HeadPruning
from .budgets import ranks

BASES = ("snapkv", "adakv")
_FLAT = 1e-6
"""A measure whose values differ by no more than this share of the greatest tells no token from another, and counts as
0: normalised, it would be the rounding errors alone."""


@dataclass(frozen=True)
class MixKV(AdaKV):
    """SnapKV or AdaKV with another score. Window and kernel are those of the authors' runs.

    As in their code, AdaKV's head budgets follow the attention a alone, and s is measured on the prompt itself (they
    also ship averages over a data set, by model). Chosen here: tokens, normalisation and redundancy are those of one
    visual span, so that every image keeps its share (the code takes all tokens before the window, text too); visual
    tokens inside the window compete like all others; pooling and grouped heads as for SnapKV and AdaKV here.
    """

    window: int = 64
    """Last prompt queries that rank."""
    kernel: int = 5
    """Tokens that are pooled, the token itself in their middle; 1 pools nothing."""
    base: str = "snapkv"
    """"snapkv": every head keeps equally many. "adakv": heads share a layer's budget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in BASES:
            raise ConfigError(f"base {self.base!r} is neither {' nor '.join(map(repr, BASES))}.")

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        if self.base == "snapkv":
            return HeadPruning.compress_visual(self, prefill, text)
        attention = super().scores(prefill)
        mixed = self.mixed(prefill, attention)
        kept = torch.zeros_like(mixed, dtype=torch.bool)
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            counts = self.dealt(attention[span.row, :, run], self.count(span.length)).sum(dim=1, keepdim=True)
            kept[span.row, :, run] = ranks(mixed[span.row, :, run]) < counts
        return Compressed(gather_kept_per_head(prefill, kept), text)

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        return self.mixed(prefill, super().scores(prefill))

    def mixed(self, prefill: LayerPrefill, attention_BHN: torch.Tensor) -> torch.Tensor:
        """[B, H, N]: z of the visual tokens, from their a."""
        mixed = attention_BHN.clone()
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            keys, values = (x[span.row, :, run].to(mixed.dtype) for x in (prefill.keys, prefill.values))
            mixed[span.row, :, run] = mixed_scores(attention_BHN[span.row, :, run], keys, values)
        return mixed


def mixed_scores(attention_HT: torch.Tensor, keys_HTD: torch.Tensor, values_HTD: torch.Tensor) -> torch.Tensor:
    """[H, T]: z of T tokens."""
    unit = F.normalize(keys_HTD, dim=2)
    centre = unit.mean(dim=1, keepdim=True)
    diversity = _like(-(unit * centre).sum(dim=2), attention_HT)
    importance = attention_HT + _like(values_HTD.norm(dim=2), attention_HT)
    tokens = unit.shape[1]
    redundancy = (tokens * centre.square().sum(dim=2) - 1) / max(1, tokens - 1)
    mixed: torch.Tensor = redundancy * diversity + (1 - redundancy) * importance
    return mixed


def _like(measure_HT: torch.Tensor, attention_HT: torch.Tensor) -> torch.Tensor:
    """The measure from 0 to 1, times what brings its mean to that of the attention."""
    low, high = measure_HT.amin(dim=1, keepdim=True), measure_HT.amax(dim=1, keepdim=True)
    flat = high - low <= _FLAT * measure_HT.abs().amax(dim=1, keepdim=True)
    # Its mean is 1 then.
    shape = ((measure_HT - low) / (measure_HT - low).mean(dim=1, keepdim=True)).masked_fill(flat, 0.0)
    return shape * attention_HT.mean(dim=1, keepdim=True)
