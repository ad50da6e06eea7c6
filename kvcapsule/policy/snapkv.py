"""SnapKV (arXiv 2404.14469): each KV head keeps the visual tokens that the prompt's last queries attend to, neighbours
included.

What policies that rank tokens for each KV head have in common is here, too: `HeadPruning` and `attention_received`.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..codec.kvcapsule import check_ratio
from ..methods.kept_rows import keep
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.segment import Segment
from .base import VisualPolicy

POOLINGS = ("avg", "max")
_CHUNK = 256
"""Queries whose attention is computed at once."""


@dataclass(frozen=True)
class HeadPruning(VisualPolicy):
    """Keeps the same number of every visual span's tokens in every KV head, each head its own, raw and at their
    positions.

    Rows of different tokens lie side by side, [E, H, M, D]: keys carry their rotation and attention needs no more, so
    which tokens they are is stored nowhere.
    """

    budget_field = "retention"

    retention: float
    """Kept visual tokens / visual tokens, in (0, 1]."""

    def __post_init__(self) -> None:
        check_ratio(self.retention)

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
        return Compressed(keep(moved, kept), text)

    def count(self, length: int) -> int:
        """Kept tokens of a span of `length`."""
        return max(1, round(self.retention * length))

    @abstractmethod
    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, H, N]: what each token is worth to each KV head; only visual tokens are looked at."""


def _take(x_BHND: torch.Tensor, source_BHN: torch.Tensor) -> torch.Tensor:
    return x_BHND.gather(2, source_BHN[..., None].expand(-1, -1, -1, x_BHND.shape[3]))


def attention_received(prefill: LayerPrefill, first: int) -> torch.Tensor:
    """[B, H, N]: attention that each token gets from the valid queries from position `first` on, summed over them and a
    KV head's queries.

    Exact causal softmax over all valid keys, a chunk of queries at a time: no more than [B, H, G, 256, N] is in memory
    at once.
    """
    batch, heads, tokens, _ = prefill.keys.shape
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    keys = prefill.keys.to(work)
    received = torch.zeros(batch, heads, tokens, dtype=work, device=keys.device)
    positions = torch.arange(tokens, device=keys.device)
    for begin in range(first, tokens, _CHUNK):
        end = min(begin + _CHUNK, tokens)
        query = prefill.query[:, :, begin:end].unflatten(1, (heads, -1)).to(work)
        logits = (query @ keys[:, :, None, :end].transpose(-1, -2)) * prefill.scale
        seen = prefill.valid[:, None, :end] & (positions[:end] <= positions[begin:end, None])
        attention = logits.masked_fill(~seen[:, None, None], torch.finfo(work).min).softmax(dim=-1)
        received[:, :, :end] += (attention * prefill.valid[:, None, None, begin:end, None]).sum(dim=(2, 3))
    return received


@dataclass(frozen=True)
class SnapKV(HeadPruning):
    """Score of token j in KV head h: pool over j's neighbours of sum over the last w queries i and the head's query
    heads of A_ij.

    A is the causal softmax over the whole prompt. Window 32 and kernel 7 are the paper's for LongBench; it names both
    poolings, and the authors' code averages by default. Chosen here: query heads that share a KV head are summed (the
    paper has one for one); neighbours are those of the same span, and an average at its edge is over those that there
    are; visual tokens inside the window compete like all others (the paper keeps the window: its text is kept here as
    well). In a later turn the attention is that among the turn's own tokens.
    """

    window: int = 32
    """Last prompt queries that rank."""
    kernel: int = 7
    """Tokens that are pooled, the token itself in their middle; 1 pools nothing."""
    pooling: str = "avg"
    """"avg" or "max"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window {self.window}: at least one query has to rank.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"kernel {self.kernel} is to be odd, so that the token is in the middle of its neighbours."
            )
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} is neither {' nor '.join(map(repr, POOLINGS))}.")

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        received = attention_received(prefill, max(0, prefill.keys.shape[2] - self.window))
        for span in prefill.spans:
            run = slice(span.start, span.start + span.length)
            received[span.row, :, run] = self._pool(received[span.row, :, run])
        return received

    def _pool(self, scores_HT: torch.Tensor) -> torch.Tensor:
        if self.pooling == "max":
            return F.max_pool1d(scores_HT, self.kernel, stride=1, padding=self.kernel // 2)
        return F.avg_pool1d(scores_HT, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False)
