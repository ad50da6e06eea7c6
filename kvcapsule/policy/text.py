"""Policies for the text alone, to be combined with a method for the visual tokens (kvcapsule.policy.combine)."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import ConfigError
from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.ratios import check_ratio, retained
from ..segments.quantized_rows import QuantizedRows, check_bits
from ..segments.segment import Segment
from .attention_scores import attention_received
from .base import Policy
from .budgets import best_tokens
from .packed_segments import packed

OBSERVED = 16
"""The prompt's last queries that rank its text."""


class TextPolicy(Policy):
    """A policy for the text tokens alone; as a method by itself it stores no visual token."""

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        return Compressed([], self.compress_text(prefill))

    @abstractmethod
    def compress_text(self, prefill: LayerPrefill) -> list[Segment]:
        """Segments of the tokens that are valid and in no visual span; none where there is no such token."""


@dataclass(frozen=True)
class TextPruning(TextPolicy):
    """Keeps a row's first text tokens, its last ones, and of those between the ones that the prompt's last queries
    attend to most.

    The score is SnapKV's (arXiv 2404.14469): attention from an observation window, summed over its queries and over
    query heads; its pooling over neighbours is not part of this, and all heads keep the same tokens. In a later turn
    the attention is that among the turn's own tokens, and the first tokens are those of the turn.
    """

    budget_field = "retention"

    retention: float
    """Kept text tokens / text tokens of a row, the first and the last ones included; these are kept whatever it
    says."""
    sinks: int = 4
    """First text tokens that are always kept."""
    recent: int = 16
    """Last text tokens that are always kept."""

    def __post_init__(self) -> None:
        check_ratio(self.retention, "text retention ratio")
        if self.sinks < 0 or self.recent < 0:
            raise ConfigError(f"sinks {self.sinks} and recent {self.recent} count tokens: 0 or more.")

    def compress_text(self, prefill: LayerPrefill) -> list[Segment]:
        text = prefill.valid & ~prefill.visual()
        counts = text.sum(dim=1)
        if self.retention == 1:
            return gather_kept(prefill, text, alike="text")
        place = text.cumsum(dim=1)
        always = text & ((place <= self.sinks) | (place > (counts - self.recent)[:, None]))
        wanted = torch.tensor([retained(self.retention, n) if n else 0 for n in counts.tolist()], device=text.device)
        wanted = torch.maximum(wanted, always.sum(dim=1))
        return gather_kept(prefill, best_tokens(last_attention(prefill), text, wanted, always))


def last_attention(prefill: LayerPrefill) -> torch.Tensor:
    """[B, N]: attention that each token gets from the last OBSERVED tokens of its row, summed over them and over heads.

    Rows are left-padded, so that all of them end together; only these queries' scores are computed.
    """
    return attention_received(prefill, max(0, prefill.keys.shape[2] - OBSERVED)).sum(dim=1)


@dataclass(frozen=True)
class QuantizedText(TextPolicy):
    """All text tokens in few bits, a step and a zero for each channel of a row of the batch (see QuantizedRows).

    Step and zero take as much as two raw tokens, so text of a few tokens saves little or nothing.
    """

    bits: int
    """Bits of one code: 1, 2, 3, 4 or 8."""

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def compress_text(self, prefill: LayerPrefill) -> list[Segment]:
        text = prefill.valid & ~prefill.visual()
        pack = partial(QuantizedRows.pack, bits=self.bits)
        return packed(gather_kept(prefill, text, alike="text"), pack, pack)
