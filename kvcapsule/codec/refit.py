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


def assigned_shares(
    reading: BankAttention, rows_EHMQ: torch.Tensor, kept_EHM: torch.Tensor, shared_EHMT: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean attention of each token at the kept key whose attention is most alike, [E, H, T, M]; 0 at the others.

    Args:
        reading: of the full tiles.
        rows_EHMQ: attention of the kept keys.
        kept_EHM: their tokens, each assigned to itself.
        shared_EHMT: products of `rows_EHMQ` with the attention of all tokens, if they are known.
    """
    if shared_EHMT is None:
        shared_EHMT = products(rows_EHMQ, reading.attention)
    # Similarity is the cosine of attention columns; dividing by the norm of the token's own column would not change
    # the assignment.
    length = torch.linalg.vector_norm(rows_EHMQ, dim=-1).clamp_min(1e-12)
    stands_for = assignment(shared_EHMT / length[..., None], kept_EHM)
    return stands_for * reading.mass.clamp_min(_LEAST_MASS)[..., None]


def fit_bias(kept: KeptAttention, share_EHTM: torch.Tensor) -> torch.Tensor:
    """Biases [E, H, M] of kept keys; share_EHTM: assigned_shares."""
    tile = share_EHTM.shape[2]
    start = share_EHTM.sum(2) / kept.weight.clamp(_LEAST_MASS, tile)
    return fit_masses(kept.rows, kept.total, start, tile).log()


def full_outputs(reading: BankAttention, v_EHTD: torch.Tensor) -> torch.Tensor:
    """A V, [E, H, Q, D]: attention's output over full tiles."""
    return reading.attention.transpose(-1, -2) @ v_EHTD.to(reading.attention.dtype)


def refit_values(
    weights_EHMQ: torch.Tensor, share_EHTM: torch.Tensor, v_EHTD: torch.Tensor, read_EHMD: torch.Tensor, ridge: float
) -> Refit:
    """Refit the values of kept keys.

    Args:
        weights_EHMQ: softmax of their scores and biases, as these are read.
        share_EHTM: assigned_shares.
        v_EHTD: the tile's values.
        read_EHMD: products of the weights with the full tile's output.
        ridge: pull towards the means of the assigned tokens, relative to the mean squared weight of a row.
    """
    means = (share_EHTM / share_EHTM.sum(2, keepdim=True)).transpose(-1, -2) @ v_EHTD.to(weights_EHMQ.dtype)
    gram = products(weights_EHMQ, weights_EHMQ)
    left = read_EHMD - gram @ means
    pull = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    gram = gram + pull * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return Refit(means + torch.linalg.solve(gram, left), gram)
