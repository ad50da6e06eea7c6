"""SnapKV (arXiv 2404.14469): each KV head keeps the visual tokens that the prompt's last queries attend to, neighbours
included."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..methods.layer_prefill import LayerPrefill
from .attention_scores import attention_received
from .base import HeadPruning

POOLINGS = ("avg", "max")


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

    reads_question = True

    window: int = 32
    """Last prompt queries that rank."""
    kernel: int = 7
    """Tokens that are pooled, the token itself in their middle; 1 pools nothing."""
    pooling: str = "avg"
    """"avg" or "max"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(f"window {self.window}: at least one query has to rank.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(
                f"kernel {self.kernel} is to be odd, so that the token is in the middle of its neighbours."
            )
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling {self.pooling!r} is neither {' nor '.join(map(repr, POOLINGS))}.")

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
