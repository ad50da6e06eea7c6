"""Training of a compact capsule's learned token selector: it imitates a slower, greedy choice of tokens."""

import torch
import torch.nn.functional as F

from kvcapsule.codec.attention_matching import BankAttention, targets
from kvcapsule.codec.compact import CompactLayer
from kvcapsule.codec.token_selector import TokenSelector

from ..processes import add_up, ratio

_CHUNK = 32
"""Tiles whose choice is made at once."""


def greedy_choice(reading: BankAttention, v_EHTD: torch.Tensor, count: int) -> torch.Tensor:
    """The teacher: one token after the other, always the one that adds most to what is explained of the tile's output
    and mass.

    Orthogonal matching pursuit with the paper's mass and the output as targets; one step for each token kept, on all
    tiles and heads at once, T (D + M) multiplications a step. Returns [E, H, count] in rising order.
    """
    gram, target, _ = targets(reading, v_EHTD)
    left = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-6 * left.amax(-1, keepdim=True)
    free = torch.ones_like(left, dtype=torch.bool)
    columns = gram.new_zeros(*left.shape, 0)
    picks: list[torch.Tensor] = []
    for _ in range(count):
        gain = (target.square().sum(-1) / left.clamp_min(floor)).masked_fill(~free, -1.0)
        pick = gain.argmax(-1)[..., None]
        picks.append(pick)
        free = free.scatter(-1, pick, False)
        before = columns.gather(2, pick[..., None].expand(-1, -1, -1, columns.shape[-1]))
        column = gram.gather(3, pick[:, :, None].expand(-1, -1, gram.shape[2], -1))[..., 0] - (columns * before).sum(-1)
        column = column / left.gather(-1, pick).clamp_min(floor).sqrt()
        projection = (
            target.gather(2, pick[..., None].expand(-1, -1, -1, target.shape[-1]))
            / left.gather(-1, pick).clamp_min(floor).sqrt()[..., None]
        )
        target = target - column[..., None] * projection
        left = (left - column.square()).clamp_min(0.0)
        columns = torch.cat([columns, column[..., None]], dim=-1)
    return torch.cat(picks, dim=-1).sort(-1).values


def chosen_by_teacher(codec: CompactLayer, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> torch.Tensor:
    """[E, H, T] bool: the tokens that the greedy choice keeps."""
    kept = [
        greedy_choice(codec.bank_attention(k), v, codec.stored)
        for k, v in zip(k_EHTD.split(_CHUNK), v_EHTD.split(_CHUNK), strict=True)
    ]
    marked = torch.zeros(k_EHTD.shape[:3], dtype=torch.bool, device=k_EHTD.device)
    return marked.scatter(-1, torch.cat(kept), True)


def imitation_loss(
    selector: TokenSelector, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, chosen_EHT: torch.Tensor
) -> torch.Tensor:
    """Binary cross-entropy of the selector's scores to the teacher's choice, over the tiles of all processes."""
    scores = selector(k_EHTD, v_EHTD)
    lost = F.binary_cross_entropy_with_logits(scores, chosen_EHT.to(scores.dtype), reduction="sum")
    return ratio(lost, torch.tensor(float(scores.numel()), device=scores.device))


def initialise(selector: TokenSelector, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, seed: int = 0) -> None:
    """Take the selector's mean and spread from tiles of all processes, and draw its weights."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.cat([k_EHTD, v_EHTD], dim=-1).double()
    count = torch.tensor(float(tokens.shape[0] * tokens.shape[2]), dtype=torch.float64, device=tokens.device)
    total = tokens.sum((0, 2))
    add_up(count, total)
    mean = total / count
    squares = (tokens - mean[:, None]).square().sum((0, 2))
    add_up(squares)
    with torch.no_grad():
        selector.mean.copy_(mean)
        selector.spread.copy_((squares / (count - 1)).sqrt().clamp_min(1e-6))
        for weights in (selector.inner, selector.outer):
            weights.copy_(torch.randn(weights.shape, generator=random) * weights.shape[1] ** -0.5)
        for weights in (selector.place, selector.place_bias):
            weights.zero_()
