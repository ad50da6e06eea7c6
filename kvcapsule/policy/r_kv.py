"""R-KV (arXiv 2505.24133): every 128 written tokens each KV head drops the least important and most redundant ones,
down to a budget.

    I_j = mean over the last a queries i of  max over j' near j of  softmax_j'( max over the head's queries g of q_ig .
                                             k_j' * scale )
    S   = cosine similarity of keys, 0 on the diagonal and where a token is similar (S > T) to the beta most recent ones
    R_j = softmax_j( mean over i of S_ij )
    Z_j = lambda I_j - (1 - lambda) R_j         the head keeps the a observed tokens and those of the highest Z

Shapes: B batch rows, H KV heads, G query heads per KV head, N tokens, C = N - a candidates, W = a observed queries, D
head dim.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, DecodeState, DecodeTimeMethod
from ..segments.segment import Segment
from .base import VisualPolicy
from .budgets import ranks
from .head_rows import HeadRows, side_by_side

SCOPES = ("generated", "all")
PROMPT = "prompt"
"""Segment.tag of a prompt's text, which scope "generated" leaves alone: all other text was written since."""
_EPS = 1e-8
"""Beside the length of a key, so that no length is 0 (the paper's)."""
_CHUNK = 256
"""Tokens whose similarity to all others is computed at once."""


@dataclass(frozen=True)
class RKV(VisualPolicy, DecodeTimeMethod):
    """Holds what is written at `budget_tokens` rows a KV head beside a buffer of new ones; positions keep counting.

    The budget is a number of tokens, not a share of a prompt, so there is no `budget_field`: however long the answer,
    the cache stays at it. Where paper and code differ, this is the paper: importance is smoothed query by query, then
    averaged; redundancy is measured against the other candidates, so that what is spared is a token that could be
    dropped; every KV head keeps its own tokens (section 3); the observed tokens count within the budget; new tokens are
    counted from the end of the prompt. As in the code, and as the authors say in words, a spared similarity lowers the
    redundancy of the more recent of two similar tokens, so that of near duplicates the newest stay. Each row of a batch
    is ranked by itself.

    `Combined(capsule, RKV())` combines it with a capsule for the visual tokens; scope "all" is for R-KV alone.
    """

    compresses_text = True
    drops_tokens = True

    budget_tokens: int = 128
    """Rows a KV head keeps, the observed ones included; 128 is the code's example, the paper tries 128 to 4096."""
    buffer: int = 128
    """New tokens between two compressions: a head holds at most budget_tokens + buffer."""
    scope: str = "generated"
    """What competes for the budget. "generated": what was written since the prompt, which stays as it is: an answer
    reads its image and question to the end, and a visual method beside this one sees to the prompt's size. Text of a
    later turn counts as written where the turn brings no image. "all" (the code): the prompt as well, its visual tokens
    too, as its prefill ends and at every compression; a later turn's prompt is first cut by itself. Visual rows and
    text are stored apart, each head with its own count of both, so that their bytes are told apart exactly; what is
    approximate is their order: once stored, visual tokens count as older than all text."""
    window: int = 8
    """a: latest tokens that are always kept and whose queries observe the others (paper and code)."""
    mix: float = 0.1
    """lambda: weight of importance against redundancy. 0.1 is the paper's, 0.07 the code's."""
    threshold: float = 0.5
    """T: tokens are similar when the cosine of their keys is above it. The paper does not say; 0.5 is the code's."""
    beta: int = 1
    """Most recent similar tokens that a token spares. The paper does not say; 1 is the code's."""
    kernel: int = 7
    """Tokens over which importance is smoothed by its maximum, the token itself in their middle (the paper's 2W, not
    stated); the code's is 7; 1 smooths nothing. Neighbours are those that are stored side by side."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"scope {self.scope!r} is neither {' nor '.join(map(repr, SCOPES))}.")
        if self.window < 1:
            raise ConfigError(f"window {self.window}: at least one token has to observe.")
        if self.buffer < self.window:
            raise ConfigError(
                f"buffer {self.buffer} is smaller than the window {self.window}, whose tokens are to be new ones."
            )
        if self.budget_tokens <= self.window:
            raise ConfigError(
                f"budget_tokens {self.budget_tokens} leaves no room beside the {self.window} observed tokens."
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(
                f"kernel {self.kernel} is to be odd, so that the token is in the middle of its neighbours."
            )
        if not 0 <= self.mix <= 1:
            raise ConfigError(f"mix {self.mix} is the share of importance in the score: from 0 to 1.")
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold {self.threshold} is a cosine: from -1 to 1.")
        if self.beta < 0:
            raise ConfigError(f"beta {self.beta} counts tokens: 0 or more.")

    @property
    def interval(self) -> int:
        """New tokens after which it acts."""
        return self.buffer

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        if self.scope == "all":
            heads = prefill.keys.shape[1]
            valid, visual = (x[:, None].expand(-1, heads, -1) for x in (prefill.valid, prefill.visual()))
            rows = HeadRows(prefill.keys, prefill.values, valid, visual)
            observed = slice(-self.window, None)
            return self._drop(rows, prefill.query[:, :, observed], prefill.valid[:, observed], prefill.scale)
        compressed = super().compress(prefill)
        return Compressed(compressed.visual, [replace(segment, tag=PROMPT) for segment in compressed.text])

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        return Compressed(gather_kept(prefill, prefill.visual(), alike="visual"), text)

    def decode_time(self) -> DecodeTimeMethod:
        return self

    @torch.no_grad()
    def on_decode(self, state: DecodeState) -> Compressed:
        """Bring what competes for the budget, the tail with it, down to the budget."""
        batch, heads = state.keys.shape[:2]
        tail = Segment(state.keys, state.values, torch.arange(batch, device=state.keys.device), mask=state.valid)
        everything = self.scope == "all"
        prompt = [s for s in state.text if s.tag == PROMPT]
        generated = [s for s in state.text if s.tag != PROMPT]
        rows = side_by_side(state.visual if everything else [], [*generated, tail], batch, heads)
        compressed = self._drop(rows, state.query, state.valid[:, -state.query.shape[2] :], state.scale)
        return Compressed(compressed.visual if everything else state.visual, [*prompt, *compressed.text])

    def _drop(self, rows: HeadRows, query: torch.Tensor, query_valid: torch.Tensor, scale: float) -> Compressed:
        kept = self.kept(rows, query, query_valid, scale)
        return Compressed(rows.store(kept & rows.visual), rows.store(kept & ~rows.visual))

    def kept(self, rows: HeadRows, query: torch.Tensor, query_valid: torch.Tensor, scale: float) -> torch.Tensor:
        """[B, H, N] bool: the tokens that each KV head keeps; all, where they are within the budget.

        Args:
            rows: N tokens.
            query: [B, H * G, W, D], those of the last W tokens.
            query_valid: [B, W] bool: False at queries of padding.
            scale: factor of the scores.
        """
        if bool((rows.valid.sum(dim=2) <= self.budget_tokens).all()):
            return rows.valid
        candidates = rows.valid[:, :, : -self.window]
        keys = rows.keys.to(torch.promote_types(rows.keys.dtype, torch.float32)).masked_fill(
            ~rows.valid[..., None], 0.0
        )
        important = self.importance(query.to(keys.dtype), keys[:, :, : -self.window], candidates, query_valid, scale)
        redundant = self.redundancy(keys[:, :, : -self.window], candidates)
        scores = self.mix * important - (1 - self.mix) * redundant
        observed = rows.valid[:, :, -self.window :]
        free = self.budget_tokens - observed.sum(dim=2, keepdim=True)
        best = ranks(scores.masked_fill(~candidates, -torch.inf)) < free
        return torch.cat([candidates & best, observed], dim=2)

    def importance(
        self, query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor, query_valid: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[B, H, C]: I of candidates whose keys are [B, H, C, D] and which are there where `valid` [B, H, C] is True; 0
        elsewhere."""
        query_BHGWD = query.unflatten(1, (keys.shape[1], -1))
        logits = (query_BHGWD @ keys[:, :, None].transpose(-1, -2)).amax(dim=2) * scale
        lowest = torch.finfo(logits.dtype).min
        attention = logits.masked_fill(~valid[:, :, None], lowest).softmax(dim=-1)
        attention = attention.masked_fill(~(valid[:, :, None] & query_valid[:, None, :, None]), 0.0)
        queries = query_valid.sum(dim=1).clamp_min(1)[:, None, None]
        smoothed = F.max_pool1d(attention.flatten(0, 1), self.kernel, stride=1, padding=self.kernel // 2)
        return smoothed.view_as(attention).sum(dim=2) / queries * valid

    def redundancy(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[B, H, C]: R of candidates whose keys are [B, H, C, D] and which are there where `valid` [B, H, C] is True; 0
        elsewhere.

        Similarities are computed a chunk of tokens at a time: no more than [B, H, 256, C] is in memory at once.
        """
        unit = keys / (keys.norm(dim=-1, keepdim=True) + _EPS) * valid[..., None]
        total = torch.zeros_like(unit[..., 0])
        for index in torch.arange(keys.shape[2], device=keys.device).split(_CHUNK):
            total += self._unspared(unit, valid, index).sum(dim=2)
        mean = total / valid.sum(dim=2, keepdim=True).clamp_min(1)
        return mean.masked_fill(~valid, torch.finfo(mean.dtype).min).softmax(dim=2) * valid

    def _unspared(self, unit: torch.Tensor, valid: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[B, H, R, C]: similarity of the tokens `index` [R] to all, 0 to themselves, to what is not there and to those
        that they spare."""
        similarity = unit[:, :, index] @ unit.transpose(-1, -2)
        others = (
            (index[:, None] != torch.arange(unit.shape[2], device=index.device))
            & valid[:, :, None]
            & valid[:, :, index, None]
        )
        similar = others & (similarity > self.threshold)
        newer = similar.flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)
        return similarity.masked_fill(~others | (similar & (newer <= self.beta)), 0.0)
