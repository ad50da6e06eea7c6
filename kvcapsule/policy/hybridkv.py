"""HybridKV (arXiv 2604.05887): heads that look at few tokens keep these, the others keep all on the host and load
chunks query by query.

S_h  = mean over text queries of the sum of their top 5 % of attention      static where S_h >= theta, dynamic otherwise
B    = budget * tokens * heads of all layers;  B_dyn = ceil(r * B / heads * N_dyn);  B_stat = B - B_dyn
b_h  = a * B_stat / N_stat + (1 - a) * B_stat * S_h / sum of S over the static heads
static:  the last w tokens, all earlier text, and the earlier visual tokens with most attention from the last w queries,
         b_h in all
dynamic: B_dyn / N_dyn tokens, to the nearest power of two, loaded at each step as chunks of 8
    (kvcapsule.methods.host_retrieval)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch

from ..methods.host_retrieval import Retrieved
from ..methods.kept_rows import keep_heads
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.shared_budget import SharedBudget
from .base import Policy
from .concentration import concentration
from .head_budgets import nearest_power, share_out
from .snapkv import attention_received

GROUPS = ("mean", "min")
INDEX = ("within", "beside")


class HeadAttention(NamedTuple):
    """What is needed of one layer when budgets are known."""

    score: torch.Tensor
    """[B, H]: S."""
    received: torch.Tensor
    """[B, H, N]: attention from the window."""


class Allotment(NamedTuple):
    """What the heads of all layers get for one row of the batch, layer by layer."""

    kept: list[int]
    """Tokens that a head keeps on the device; 0: its rows are on the host."""
    loaded: list[int]
    """Chunks that a head's buffer holds; 0 where it keeps its tokens."""


@dataclass(frozen=True)
class HybridKV(SharedBudget[HeadAttention], Policy):
    """Head types and budgets are chosen for each row of the batch, from its own prompt and over all layers.

    Heads are KV heads: their rows are stored once for a group of query heads, and types for query heads by themselves
    would store them up to once for each. Chosen here, where the paper is silent or a budget would not hold: a query's
    attention is causal, and its top share is of the tokens that it sees, so that the prompt's first words (which see
    few) do not count as focused; static budgets are rounded so that their sum is exact (the paper rounds each up);
    static heads take over what the power of two adds or leaves, and where they cannot (there are none, or all keep all
    their tokens), dynamic budgets are whole chunks that make up the total. Dynamic heads whose means and buffer would
    take as much as all their tokens keep these on the device: a budget of 1 is the full cache. Text and window of
    static heads and one chunk of dynamic ones are kept whatever the budget says. With r beyond what there is, dynamic
    heads get all of it.

    Bytes of a dynamic head are counted as visual where its row has an image: chunks hold what comes, image and text.
    For the same reason the policy cannot be combined with another one. Tokens written later stay raw on the device
    for all heads (the paper does not say what becomes of them), and a later turn's prompt gets a budget, head types and
    chunks of its own. As all layers share the budget, the keys and values of all of them are on the device until the
    last layer's prefill ends.
    """

    budget_field = "budget"
    separable = False
    """Whether visual tokens and text are stored apart."""

    budget: float
    """Bytes on the device / those of all prompt tokens, in (0, 1]; 1 keeps all."""
    theta: float = 0.90
    """Attention mass S from which a head is static; 0 makes all heads static, a number above 1 all dynamic."""
    dynamic: float = 0.75
    """r: budget of a dynamic head / that of a mean head."""
    uniform: float = 0.5
    """a, in (0, 1]: share of the static heads' budget that is the same for all of them; not in the paper, so half."""
    top: float = 0.05
    """Share of the tokens that a query sees whose attention is summed: that of the paper's pilot, whose curves theta
    0.9 fits."""
    window: int = 16
    """w: last tokens that static heads keep, and whose queries rank the visual tokens; not in the paper, so few, for
    short prompts."""
    chunk: int = 8
    """Tokens that are loaded together."""
    group: str = "mean"
    """How S of the query heads that share a KV head are joined: "mean", as each is one more reader, or "min": static
    only if all are."""
    quantile: bool = False
    """Read theta as a quantile of the prompt's scores: the paper calls it quantile-based, but uses it as a mass, as is
    done here."""
    padded: bool = True
    """Round a dynamic head's budget to the nearest power of two."""
    index: str = "within"
    """Chunk means are paid for "within" the budget, so that its bytes are as said, or "beside" it, as the paper seems
    to count."""

    def __post_init__(self) -> None:
        for name, share, meaning in (
            ("budget", self.budget, "bytes on the device over those of all tokens, 1 keeps all"),
            ("uniform", self.uniform, "the share of the static heads' budget that is the same for all of them"),
            ("top", self.top, "the share of the tokens whose attention is summed"),
        ):
            if not 0 < share <= 1:
                raise ValueError(f"{name} {share} is outside (0, 1]: it is {meaning}.")
        if self.theta < 0 or (self.quantile and self.theta > 1):
            raise ValueError(
                f"theta {self.theta} is an attention mass, 0 or more, or with quantile=True a quantile from 0 to 1."
            )
        if self.dynamic <= 0:
            raise ValueError(f"dynamic {self.dynamic} is a dynamic head's budget over the mean one: more than 0.")
        if self.window < 1 or self.chunk < 1:
            raise ValueError(f"window {self.window} and chunk {self.chunk} count tokens: at least one.")
        for name, value, known in (("group", self.group, GROUPS), ("index", self.index, INDEX)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is neither {' nor '.join(map(repr, known))}.")

    @torch.no_grad()
    def observe(self, prefill: LayerPrefill) -> HeadAttention:
        mass = concentration(prefill, self.top)
        score = mass.mean(dim=2) if self.group == "mean" else mass.amin(dim=2)
        return HeadAttention(score, attention_received(prefill, max(0, prefill.keys.shape[2] - self.window)))

    @torch.no_grad()
    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[HeadAttention]) -> list[Compressed]:
        first = prefills[0]
        layers, (batch, heads) = len(prefills), first.keys.shape[:2]
        always = self.always(first)
        key, value = first.keys.shape[3], first.values.shape[3]
        scores = torch.stack([o.score for o in observations], dim=1).flatten(1).tolist()
        counts = torch.stack([first.valid.sum(dim=1), always.sum(dim=1)], dim=1).tolist()
        # A mean has no value beside it: of a token's bytes it takes the key's share.
        allotted = [
            self.allot(s, tokens, least, ceil(tokens / self.chunk) * key / (key + value))
            for s, (tokens, least) in zip(scores, counts, strict=True)
        ]
        kept, loaded = (
            torch.tensor(x, device=first.keys.device).view(batch, layers, heads).unbind(1)
            for x in ([a.kept for a in allotted], [a.loaded for a in allotted])
        )
        return [self._store(p, o.received, *n) for p, o, *n in zip(prefills, observations, kept, loaded, strict=True)]

    def always(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, N] bool: the window and all text."""
        from_end = prefill.valid.flip(1).cumsum(dim=1).flip(1)
        return prefill.valid & (~prefill.visual() | (from_end <= self.window))

    def static(self, scores: Sequence[float]) -> list[bool]:
        """Which heads are static."""
        bar = float(torch.tensor(scores, dtype=torch.float64).quantile(self.theta)) if self.quantile else self.theta
        return [score >= bar for score in scores]

    def allot(self, scores: Sequence[float], tokens: int, always: int, means: float) -> Allotment:
        """Share one row's budget out.

        Args:
            scores: S of the heads of all layers.
            tokens: of the row.
            always: of these, what a static head keeps in any case.
            means: what the chunk means of a dynamic head take, in tokens.
        """
        static = self.static(scores)
        dynamic = len(static) - sum(static)
        inside = means if self.index == "within" else 0.0
        total = max(0.0, self.budget * tokens * len(static) - inside * dynamic)
        each = min(float(tokens), self._dynamic_budget(total / len(static), dynamic, len(static))) if dynamic else 0.0
        focused = [score for score, is_static in zip(scores, static, strict=True) if is_static]
        given = self._static_budgets(focused, total - dynamic * each, always, tokens)
        left = total - sum(given)
        if dynamic and max(left / dynamic, self.chunk) + inside < tokens - 1e-6:
            whole, more = divmod(max(dynamic, round(left / self.chunk)), dynamic)
            chunks = [min(whole + (i < more), ceil(tokens / self.chunk)) for i in range(dynamic)]
            kept = [0] * dynamic
        else:
            chunks, kept = [0] * dynamic, [tokens] * dynamic
        return Allotment(_woven(static, given, kept), _woven(static, [0] * len(given), chunks))

    def _dynamic_budget(self, mean: float, dynamic: int, heads: int) -> float:
        """Tokens of each dynamic head, for a mean budget of all heads."""
        each = ceil(round(min(self.dynamic, heads / dynamic) * mean * dynamic, 6)) / dynamic
        return max(self.chunk, nearest_power(each)) if self.padded else each

    def _static_budgets(self, scores: Sequence[float], total: float, always: int, tokens: int) -> list[int]:
        """Tokens of the static heads, with these scores."""
        if not scores:
            return []
        wanted = [
            self.uniform * total / len(scores) + (1 - self.uniform) * total * score / max(sum(scores), 1e-9)
            for score in scores
        ]
        return share_out(wanted, always, tokens, round(total))

    def _store(
        self, prefill: LayerPrefill, received: torch.Tensor, kept: torch.Tensor, loaded: torch.Tensor
    ) -> Compressed:
        """A layer whose heads keep `kept` [B, H] tokens each, or load `loaded` [B, H] chunks each."""
        visual, always = prefill.visual(), self.always(prefill)
        scores = received.masked_fill(~(prefill.valid & ~always)[:, None], -1.0)
        rank = scores.argsort(dim=2, descending=True, stable=True).argsort(dim=2, stable=True)
        best = rank < (kept - always.sum(dim=1, keepdim=True))[..., None]
        chosen = prefill.valid[:, None] & (always[:, None] | best) & (kept > 0)[..., None]
        compressed = Compressed(
            keep_heads(prefill, chosen & visual[:, None]), keep_heads(prefill, chosen & ~visual[:, None])
        )
        rows, heads = loaded.nonzero(as_tuple=True)
        alike = torch.stack(
            [visual.any(dim=1)[rows].long(), prefill.valid.sum(dim=1)[rows], loaded[rows, heads]], dim=1
        )
        for form in alike.unique(dim=0):
            entries = (alike == form).all(dim=1)
            has_image, _, count = form.tolist()
            side = compressed.visual if has_image else compressed.text
            side.append(Retrieved.of(prefill, rows[entries], heads[entries], self.chunk, count))
        return compressed


def _woven(static: Sequence[bool], of_static: Sequence[int], of_dynamic: Sequence[int]) -> list[int]:
    """What static and dynamic heads have, in the order of all heads."""
    sources = {True: iter(of_static), False: iter(of_dynamic)}
    return [next(sources[is_static]) for is_static in static]
