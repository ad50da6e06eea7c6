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
from math import ceil, floor, log2
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..methods.host_retrieval import Retrieved
from ..methods.kept_rows import gather_kept_per_head
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..methods.shared_budget import SharedBudget
from .attention_scores import attention_chunks, attention_received
from .base import Policy
from .budgets import ranks, share_out


class HeadAttention(NamedTuple):
    """What is measured of one layer before the budgets are known."""

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
    would store them up to once for each. Chosen here, where the paper is silent or a budget would not hold:

    - A query's attention is causal, and its top share is of the tokens that it sees, so that the prompt's first words
      (which see few) do not count as focused. A score is the mean over the query heads that share a KV head.
    - theta is an attention mass, as the paper uses it, and not the quantile that it is called.
    - Chunk means count within the budget, so that its bytes are as said; the paper seems to count them beside it.
    - Static budgets are rounded so that their sum is exact (the paper rounds each up). Static heads take over what the
      power of two adds or leaves; where they cannot (there are none, or all keep all their tokens), dynamic budgets are
      chunks that make up the total.
    - Dynamic heads whose means and buffer would take as much as all their tokens keep these on the device: a budget of
      1 is the full cache. Text and window of static heads and one chunk of dynamic ones are kept whatever the budget
      says. With r beyond what there is, dynamic heads get all of it.

    Bytes of a dynamic head are counted as visual where its row has an image: chunks hold what comes, image and text.
    For the same reason the policy cannot be combined with another one. Tokens written later stay raw on the device
    for all heads (the paper does not say what becomes of them), and a later turn's prompt gets a budget, head types and
    chunks of its own. As all layers share the budget, the keys and values of all of them are on the device until the
    last layer's prefill ends.
    """

    reads_question = True
    budget_field = "budget"
    separable = False

    budget: float
    """Bytes on the device / those of all prompt tokens, in (0, 1]; 1 keeps all."""
    theta: float = 0.90
    """Attention mass S from which a head is static; 0 makes all heads static, a number above 1 all dynamic."""
    dynamic: float = 0.75
    """r: budget of a dynamic head, as a multiple of the mean head's."""
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

    def __post_init__(self) -> None:
        for name, share, meaning in (
            ("budget", self.budget, "bytes on the device over those of all tokens, 1 keeps all"),
            ("uniform", self.uniform, "the share of the static heads' budget that is the same for all of them"),
            ("top", self.top, "the share of the tokens whose attention is summed"),
        ):
            if not 0 < share <= 1:
                raise ConfigError(f"{name} {share} is outside (0, 1]: it is {meaning}.")
        if self.theta < 0:
            raise ConfigError(f"theta {self.theta} is an attention mass: 0 or more.")
        if self.dynamic <= 0:
            raise ConfigError(f"dynamic {self.dynamic} is a dynamic head's budget over the mean one: more than 0.")
        if self.window < 1 or self.chunk < 1:
            raise ConfigError(f"window {self.window} and chunk {self.chunk} count tokens: at least one.")

    @torch.no_grad()
    def observe(self, prefill: LayerPrefill) -> HeadAttention:
        score = concentration(prefill, self.top).mean(dim=2)
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
        budgets = [
            self.allot(s, tokens, least, ceil(tokens / self.chunk) * key / (key + value))
            for s, (tokens, least) in zip(scores, counts, strict=True)
        ]
        kept, loaded = (
            torch.tensor(x, device=first.keys.device).view(batch, layers, heads).unbind(1)
            for x in ([a.kept for a in budgets], [a.loaded for a in budgets])
        )
        return [self._store(p, o.received, *n) for p, o, *n in zip(prefills, observations, kept, loaded, strict=True)]

    def always(self, prefill: LayerPrefill) -> torch.Tensor:
        """[B, N] bool: the window and all text."""
        from_end = prefill.valid.flip(1).cumsum(dim=1).flip(1)
        return prefill.valid & (~prefill.visual() | (from_end <= self.window))

    def allot(self, scores: Sequence[float], tokens: int, always: int, means: float) -> Allotment:
        """Share one row's budget out.

        Args:
            scores: S of the heads of all layers.
            tokens: of the row.
            always: of these, what a static head keeps in any case.
            means: what the chunk means of a dynamic head take, in tokens.
        """
        static = [score >= self.theta for score in scores]
        dynamic = len(static) - sum(static)
        total = max(0.0, self.budget * tokens * len(static) - means * dynamic)
        of_dynamic = self._dynamic_budget(total / len(static), dynamic, len(static), tokens) if dynamic else 0.0
        focused = [score for score, is_static in zip(scores, static, strict=True) if is_static]
        of_static = self._static_budgets(focused, total - dynamic * of_dynamic, always, tokens)
        left = total - sum(of_static)
        if dynamic and max(left / dynamic, self.chunk) + means < tokens - 1e-6:
            at_least, more = divmod(max(dynamic, round(left / self.chunk)), dynamic)
            chunks = [min(at_least + (i < more), ceil(tokens / self.chunk)) for i in range(dynamic)]
            kept = [0] * dynamic
        else:
            chunks, kept = [0] * dynamic, [tokens] * dynamic
        return Allotment(_woven(static, of_static, kept), _woven(static, [0] * len(of_static), chunks))

    def _dynamic_budget(self, mean: float, dynamic: int, heads: int, tokens: int) -> float:
        """Tokens of one dynamic head, for a mean budget of all heads."""
        exact = ceil(round(min(self.dynamic, heads / dynamic) * mean * dynamic, 6)) / dynamic
        return min(float(tokens), max(self.chunk, nearest_power(exact)))

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
        best = ranks(scores) < (kept - always.sum(dim=1, keepdim=True))[..., None]
        chosen = prefill.valid[:, None] & (always[:, None] | best) & (kept > 0)[..., None]
        compressed = Compressed(
            gather_kept_per_head(prefill, chosen & visual[:, None]),
            gather_kept_per_head(prefill, chosen & ~visual[:, None]),
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


def concentration(prefill: LayerPrefill, top: float) -> torch.Tensor:
    """[B, H, G]: for each query head the attention on a text query's ceil(top * n) most attended of n visible tokens, a
    mean over queries; 0 for a row without text: nothing then says that a head is focused."""
    batch, heads = prefill.keys.shape[:2]
    text = prefill.valid & ~prefill.visual()
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    mass = torch.zeros(batch, heads, prefill.query.shape[1] // heads, dtype=work, device=prefill.keys.device)
    for chunk in attention_chunks(prefill, text, alike="text"):
        # A product that is a whole number but for the last bit of a double is that number.
        most = (top * chunk.visible.sum(dim=2).double() - 1e-6).ceil().clamp_min(1)
        tokens = chunk.weights.shape[4]
        best = chunk.weights.topk(max(1, ceil(top * tokens - 1e-6)), dim=-1).values
        counted = torch.arange(best.shape[-1], device=best.device) < most[..., None]
        mass += (best * counted[:, None, None]).sum(dim=(3, 4))
    return mass / text.sum(dim=1).clamp_min(1)[:, None, None]


def nearest_power(count: float) -> int:
    """The power of two that lies nearest, at least 1; of two that lie equally near, the greater."""
    if count <= 1:
        return 1
    below = 2 ** floor(log2(count))
    return int(below if count - below < 2 * below - count else 2 * below)
