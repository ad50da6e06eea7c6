"""Refit of a compact tile: biases and values for kept keys, as these will be read.

For a tile with the attention A [Q, T] of the query bank, and kept keys with scores S [M, Q]:

    bias     b = log w, w > 0 with exp(S)^T w ~ the softmax mass of the full tile
    values   C with softmax(S + b)^T C ~ A V

Both are regularised: a token of the tile is assigned to the kept key whose attention is most alike, the weights are
drawn towards the masses of what is assigned, and the values towards its mean.
"""

from typing import NamedTuple

import torch

from .attention_matching import BankAttention, assignment, fit_masses, gather_rows, products

_LEAST_MASS = 1e-8
"""Lower bound of a token's mean attention, where it divides or weights."""


class KeptAttention(NamedTuple):
    """Attention of the query bank over kept keys; divided by the softmax mass of the full tile, or by their own where
    that is larger."""

    scores: torch.Tensor
    """[E, H, M, Q]."""
    rows: torch.Tensor
    """[E, H, M, Q]."""
    total: torch.Tensor
    """[E, H, 1, Q]: the mass of the full tile in the same measure."""
    weight: torch.Tensor
    """[E, H, M]: mean over the queries, in masses of the full tile."""


class Masses(NamedTuple):
    """Fitted masses of kept keys."""

    bias: torch.Tensor
    """[E, H, M]."""
    share: torch.Tensor
    """[E, H, T, M]: mean attention of each token, at the key that it is assigned to."""


class Refit(NamedTuple):
    """Refit values and the metric of their errors."""

    values: torch.Tensor
    """[E, H, M, D]."""
    gram: torch.Tensor
    """[E, H, M, M]: an error e [M] of a channel's values costs e^T gram e (attention's output under the bank, and the
    regularisation)."""


def attention_of_kept_keys(reading: BankAttention, kept_EHM: torch.Tensor) -> KeptAttention:
    """Of keys that are read as they were."""
    return KeptAttention(
        gather_rows(reading.scores, kept_EHM),
        gather_rows(reading.attention, kept_EHM),
        torch.ones_like(reading.log_mass),
        reading.mass.gather(-1, kept_EHM),
    )


def attention_of_read_keys(reading: BankAttention, scores_EHMQ: torch.Tensor) -> KeptAttention:
    """Of keys that are read with these scores, such as quantised ones."""
    # Coarsely quantised keys may exceed the mass of the full tile.
    top = torch.maximum(reading.log_mass, scores_EHMQ.logsumexp(-2, keepdim=True))
    return KeptAttention(
        scores_EHMQ,
        (scores_EHMQ - top).exp(),
        (reading.log_mass - top).exp(),
        (scores_EHMQ - reading.log_mass).exp().mean(-1),
    )


def fit_bias(
    reading: BankAttention, kept: KeptAttention, kept_EHM: torch.Tensor, shared_EHMT: torch.Tensor | None = None
) -> Masses:
    """Fit the masses of kept keys.

    Args:
        reading: of the full tiles.
        kept: of the kept keys.
        kept_EHM: their tokens.
        shared_EHMT: products of `kept.rows` with the attention of all tokens, if they are known.
    """
    tile = reading.attention.shape[2]
    if shared_EHMT is None:
        shared_EHMT = products(kept.rows, reading.attention)
    # Similarity is the cosine of attention columns; dividing by the norm of the token's own column would not change
    # the assignment.
    length = torch.linalg.vector_norm(kept.rows, dim=-1).clamp_min(1e-12)
    stands_for = assignment(shared_EHMT / length[..., None], kept_EHM)
    share = stands_for * reading.mass.clamp_min(_LEAST_MASS)[..., None]
    start = share.sum(2) / kept.weight.clamp(_LEAST_MASS, tile)
    return Masses(fit_masses(kept.rows, kept.total, start, tile).log(), share)


def refit_values(
    reading: BankAttention,
    scores_EHMQ: torch.Tensor,
    bias_EHM: torch.Tensor,
    share_EHTM: torch.Tensor,
    v_EHTD: torch.Tensor,
    ridge: float,
) -> Refit:
    """Refit the values of kept keys.

    Args:
        reading: of the full tiles.
        scores_EHMQ: of the kept keys as they are read.
        bias_EHM: as it is read.
        share_EHTM: Masses.share.
        v_EHTD: the tile's values.
        ridge: pull towards the means of the assigned tokens, relative to the mean squared weight of a row.
    """
    work = reading.attention.dtype
    values = v_EHTD.to(work)
    means = (share_EHTM / share_EHTM.sum(2, keepdim=True)).transpose(-1, -2) @ values
    weights = (scores_EHMQ + bias_EHM.to(work)[..., None]).softmax(-2)
    gram = products(weights, weights)
    left = products(weights, reading.attention) @ values - gram @ means
    pull = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    gram = gram + pull * torch.eye(gram.shape[-1], dtype=work, device=gram.device)
    return Refit(means + torch.linalg.solve(gram, left), gram)
