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

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ..methods.kept_rows import keep
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, DecodeState, DecodeTimeMethod
from ..segments.segment import Segment
from .base import VisualPolicy
from .head_rows import HeadRows, side_by_side

CHOICES = {
    "scope": ("generated", "all"),
    "pooling": ("query", "mean"),
    "similar_to": ("candidates", "all"),
    "spared": ("neighbour", "token"),
    "heads": ("each", "shared"),
}
"""The values of the settings that are words."""
_EPS = 1e-8
"""Beside the length of a key, so that no length is 0 (the paper's)."""
_CHUNK = 256
"""Tokens whose similarity to all others is computed at once."""


@dataclass(frozen=True)
class Prompt(Segment):
    """Rows of a prompt that R-KV leaves alone, in its scope "generated": all other text was written since."""


@dataclass(frozen=True)
class RKV(VisualPolicy, DecodeTimeMethod):
    """Holds what is written at `budget_tokens` rows a KV head beside a buffer of new ones; positions keep counting.

    The budget is a number of tokens, not a share of a prompt, so there is no `budget_field`: however long the answer,
    the cache stays at it. Where paper and code differ or are silent, the choice is a field. New tokens are counted from
    the end of the prompt, as in the paper (the authors' first code compresses whenever the whole length is a multiple
    of 128). Each row of a batch is ranked by itself.

    `Combined(capsule, RKV())` combines it with a capsule for the visual tokens; scope "all" is for R-KV alone.
    """

    compresses_text = True

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
    pooling: str = "query"
    """"query" (paper): each query's attention is smoothed, then averaged. "mean" (code): averaged, then smoothed."""
    similar_to: str = "candidates"
    """Whom a candidate's redundancy is measured against: the other "candidates" (paper), so that what is spared is a
    token that could be dropped; or "all" (code), observed tokens as well, which stay anyway."""
    spared: str = "neighbour"
    """Whose redundancy the spared similarities lower. "neighbour" (the code; so say the authors in words): that of the
    most recent similar tokens, so that of near duplicates the newest stay. "token" (the paper's formula to the letter):
    that of the token itself."""
    spare_first: bool = False
    """Whether a token without any similar one spares the oldest token, as in the code, where this looks like an
    oversight."""
    heads: str = "each"
    """"each" (the paper's section 3, and the code): every KV head keeps its own tokens. "shared" (its algorithm 1):
    scores are averaged over the heads, which then keep the same."""
    beyond: bool = False
    """Whether the observed tokens come on top of the budget (the paper's algorithm 1) instead of within it (section 3,
    and the code)."""

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work, naming them."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is neither {' nor '.join(map(repr, choices))}.")
        if self.window < 1:
            raise ValueError(f"window {self.window}: at least one token has to observe.")
        if self.buffer < self.window:
            raise ValueError(
                f"buffer {self.buffer} is smaller than the window {self.window}, whose tokens are to be new ones."
            )
        if self.limit <= self.window:
            raise ValueError(
                f"budget_tokens {self.budget_tokens} leaves no room beside the {self.window} observed tokens."
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"kernel {self.kernel} is to be odd, so that the token is in the middle of its neighbours."
            )
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix {self.mix} is the share of importance in the score: from 0 to 1.")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} is a cosine: from -1 to 1.")
        if self.beta < 0:
            raise ValueError(f"beta {self.beta} counts tokens: 0 or more.")

    @property
    def limit(self) -> int:
        """Rows a KV head keeps, all in all."""
        return self.budget_tokens + (self.window if self.beyond else 0)

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
            return self._hold(
                rows, prefill.query[:, :, -self.window :], prefill.valid[:, -self.window :], prefill.scale
            )
        compressed = super().compress(prefill)
        return Compressed(compressed.visual, [_as_prompt(segment) for segment in compressed.text])

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        return Compressed(keep(prefill, prefill.visual()), text)

    def decode_time(self) -> DecodeTimeMethod:
        return self

    @torch.no_grad()
    def on_decode(self, state: DecodeState) -> Compressed:
        """Bring what competes for the budget, the tail with it, down to the budget."""
        batch, heads = state.keys.shape[:2]
        whole = self.scope == "all"
        left = [] if whole else [s for s in state.text if isinstance(s, Prompt)]
        tail = Segment(state.keys, state.values, torch.arange(batch, device=state.keys.device), mask=state.valid)
        text = [*(s for s in state.text if whole or not isinstance(s, Prompt)), tail]
        rows = side_by_side(state.visual if whole else [], text, batch, heads)
        held = self._hold(rows, state.query, state.valid[:, -state.query.shape[2] :], state.scale)
        return Compressed(held.visual if whole else state.visual, [*left, *held.text])

    def _hold(self, rows: HeadRows, query: torch.Tensor, asking: torch.Tensor, scale: float) -> Compressed:
        kept = self.kept(rows, query, asking, scale)
        return Compressed(rows.store(kept & rows.visual), rows.store(kept & ~rows.visual))

    def kept(self, rows: HeadRows, query: torch.Tensor, asking: torch.Tensor, scale: float) -> torch.Tensor:
        """[B, H, N] bool: the tokens that each KV head keeps; all, where they are within the budget.

        Args:
            rows: N tokens.
            query: [B, H * G, W, D], those of the last W tokens.
            asking: [B, W] bool: False at queries of padding.
            scale: factor of the scores.
        """
        if bool((rows.valid.sum(dim=2) <= self.limit).all()):
            return rows.valid
        candidates = rows.valid[:, :, : -self.window]
        keys = rows.keys.to(torch.promote_types(rows.keys.dtype, torch.float32)).masked_fill(
            ~rows.valid[..., None], 0.0
        )
        important = self.importance(query.to(keys.dtype), keys[:, :, : -self.window], candidates, asking, scale)
        redundant = self.redundancy(keys, rows.valid)
        scores = self.mix * important - (1 - self.mix) * redundant
        if self.heads == "shared":
            scores = scores.mean(dim=1, keepdim=True).expand_as(scores)
        rank = (
            scores.masked_fill(~candidates, -torch.inf)
            .argsort(dim=2, descending=True, stable=True)
            .argsort(dim=2, stable=True)
        )
        observed = rows.valid[:, :, -self.window :]
        room = self.limit - observed.sum(dim=2, keepdim=True)
        return torch.cat([candidates & (rank < room), observed], dim=2)

    def importance(
        self, query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor, asking: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[B, H, C]: I of candidates whose keys are [B, H, C, D] and which are there where `valid` [B, H, C] is True; 0
        elsewhere."""
        query_BHGWD = query.unflatten(1, (keys.shape[1], -1))
        logits = (query_BHGWD @ keys[:, :, None].transpose(-1, -2)).amax(dim=2) * scale
        lowest = torch.finfo(logits.dtype).min
        attention = logits.masked_fill(~valid[:, :, None], lowest).softmax(dim=-1)
        attention = attention.masked_fill(~(valid[:, :, None] & asking[:, None, :, None]), 0.0)
        number = asking.sum(dim=1).clamp_min(1)[:, None, None]
        if self.pooling == "mean":
            return self._smooth(attention.sum(dim=2) / number) * valid
        return self._smooth(attention.flatten(0, 1)).view_as(attention).sum(dim=2) / number * valid

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        smoothed: torch.Tensor = F.max_pool1d(x, self.kernel, stride=1, padding=self.kernel // 2)
        return smoothed

    def redundancy(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[B, H, C]: R of all but the last a tokens, of which keys are [B, H, N, D] and `valid` [B, H, N]; 0 where
        there is none.

        Similarities are computed a chunk of tokens at a time: no more than [B, H, 256, N] is in memory at once.
        """
        among = keys.shape[2] - (self.window if self.similar_to == "candidates" else 0)
        keys, valid = keys[:, :, :among], valid[:, :, :among]
        unit = keys / (keys.norm(dim=-1, keepdim=True) + _EPS) * valid[..., None]
        total = torch.zeros_like(unit[..., 0])
        for begin in range(0, among, _CHUNK):
            rows = torch.arange(begin, min(begin + _CHUNK, among), device=keys.device)
            similarity = self._unspared(unit, valid, rows)
            if self.spared == "token":
                total[:, :, rows] = similarity.sum(dim=3)
            else:
                total += similarity.sum(dim=2)
        mean = total / valid.sum(dim=2, keepdim=True).clamp_min(1)
        redundant = mean.masked_fill(~valid, torch.finfo(mean.dtype).min).softmax(dim=2) * valid
        return redundant if self.similar_to == "candidates" else redundant[:, :, : -self.window]

    def _unspared(self, unit: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, H, R, N]: similarity of the tokens `rows` [R] to all, 0 to themselves, to what is not there and to those
        that they spare."""
        similarity = unit[:, :, rows] @ unit.transpose(-1, -2)
        others = (
            (rows[:, None] != torch.arange(unit.shape[2], device=rows.device))
            & valid[:, :, None]
            & valid[:, :, rows, None]
        )
        similar = others & (similarity > self.threshold)
        newer = similar.flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)
        spared = similar & (newer <= self.beta)
        if self.spare_first:
            oldest = valid & (valid.cumsum(dim=2) == 1)
            spared |= ~similar.any(dim=-1, keepdim=True) & oldest[:, :, None]
        return similarity.masked_fill(~others | spared, 0.0)


def _as_prompt(segment: Segment) -> Prompt:
    return Prompt(**{field.name: getattr(segment, field.name) for field in fields(segment)})
