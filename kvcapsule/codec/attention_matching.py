"""Attention matching: attention of a query bank over tiles, and the marginal gain of each token, by which compact
capsules select tokens."""

from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F

_JITTER = 1e-4
"""Added to a token's normalised energy: keeps the factorisation stable in fp32 when tokens are nearly equal."""
_MASS_WEIGHT = 0.3
"""Weight of the tile's softmax mass relative to its output when tokens are ranked by marginal gain, in units of the
values' root mean square."""
_STEPS = 16
"""Projected gradient steps when the masses are fitted."""


class BankAttention(NamedTuple):
    """Attention of a query bank over full tiles. fp32, or fp64 for fp64 keys.

    Queries are the last axis, so that operations over few or selected tokens run along contiguous memory. The two
    leading axes are (tiles, heads), or (heads, tiles) if the queries are [H, 1, Q, D].
    """

    queries: torch.Tensor
    """[H, Q, D], multiplied by the scale of the scores."""
    scores: torch.Tensor
    """[E, H, T, Q]."""
    attention: torch.Tensor
    """A^T [E, H, T, Q]: softmax of the scores over the tokens."""
    log_mass: torch.Tensor
    """[E, H, 1, Q]: log of the softmax denominator."""
    energy: torch.Tensor
    """[E, H, T]: mean squared attention of a token over the queries."""
    mass: torch.Tensor
    """[E, H, T]: mean attention of a token over the queries."""


class Targets(NamedTuple):
    """Normal equations of the tokens of a shortlist C against the full tile's attention output."""

    gram: torch.Tensor
    """A_C^T A_C, [E, H, C, C]."""
    target: torch.Tensor
    """A_C^T times the full tile's output and mass, [E, H, C, D + 1]."""
    shared: torch.Tensor
    """A_C^T A, [E, H, C, T]."""


def bank_attention(
    queries_HQD: torch.Tensor, k_EHTD: torch.Tensor, workspace: torch.Tensor | None = None
) -> BankAttention:
    """Attention of scaled queries over tiles.

    workspace: memory for two tensors [E, H, T, Q], which the result then uses.
    """
    keys = k_EHTD.to(queries_HQD.dtype)
    first, second = (None, None) if workspace is None else workspace
    if queries_HQD.dim() == 4:
        # One product per head: batched over tiles, PyTorch would copy the queries for every tile.
        workspace = None if first is None else first.flatten(1, 2)
        scores = torch.matmul(keys.flatten(1, 2), queries_HQD[:, 0].transpose(-1, -2), out=workspace).unflatten(
            1, keys.shape[1:3]
        )
    else:
        scores = torch.matmul(keys, queries_HQD.transpose(-1, -2))
    attention = torch.softmax(scores, -2, out=second)
    # The largest score minus the log of its probability (at least 1 / T): a third of the time of logsumexp.
    log_mass = scores.amax(-2, keepdim=True) - attention.amax(-2, keepdim=True).log()
    energy = torch.linalg.vector_norm(attention, dim=-1).square() / attention.shape[-1]
    return BankAttention(queries_HQD, scores, attention, log_mass, energy, attention.mean(-1))


def targets(bank: BankAttention, v_EHTD: torch.Tensor, shortlist_EHC: torch.Tensor | None = None) -> Targets:
    """Normal equations for the tokens of a shortlist; by default for all tokens of the tile."""
    attention, values = bank.attention, v_EHTD.to(bank.attention.dtype)
    chosen = attention if shortlist_EHC is None else gather_rows(attention, shortlist_EHC)
    shared = products(chosen, attention)
    gram = shared if shortlist_EHC is None else gather_columns(shared, shortlist_EHC)
    size = torch.linalg.vector_norm(values, dim=(2, 3))[..., None, None] / sqrt(values.shape[2])
    target = shared.new_empty(*shared.shape[:3], values.shape[3] + 1)
    torch.matmul(shared, values, out=target[..., :-1])
    torch.mul(shared.sum(-1, keepdim=True), _MASS_WEIGHT * size, out=target[..., -1:])
    return Targets(gram, target, shared)


def products(x_EHMQ: torch.Tensor, y_EHTQ: torch.Tensor) -> torch.Tensor:
    """Products of each row of x with each row of y, [E, H, M, T]."""
    return x_EHMQ @ y_EHTQ.transpose(-1, -2)


def gather_rows(x_EHTN: torch.Tensor, at_EHM: torch.Tensor) -> torch.Tensor:
    """Rows of x at the indices, [E, H, M, N]. Copies full rows; `gather` would copy single elements."""
    first = torch.arange(at_EHM[..., 0].numel(), device=at_EHM.device).view(*at_EHM.shape[:2], 1) * x_EHTN.shape[2]
    rows: torch.Tensor = x_EHTN.flatten(0, 2).index_select(0, (at_EHM + first).flatten())
    return rows.view(*at_EHM.shape, -1)


def gather_columns(x_EHNT: torch.Tensor, at_EHC: torch.Tensor) -> torch.Tensor:
    """Columns of x at the indices, [E, H, N, C]."""
    return torch.gather(x_EHNT, 3, at_EHC[:, :, None].expand(-1, -1, x_EHNT.shape[2], -1))


def marginal_gains(
    gram_EHTT: torch.Tensor, target_EHTC: torch.Tensor, ranking_EHT: torch.Tensor, passes: int = 1
) -> torch.Tensor:
    """Reduction of the squared error by each token, given the tokens ranked above it, [E, H, T]; from one Cholesky
    factorisation in the order of the ranking.

    The gains are a ranking themselves; every further pass repeats the factorisation in their order.
    """
    norm = gram_EHTT.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram_EHTT.dtype).tiny).rsqrt()[..., None]
    alike, wanted = gram_EHTT * norm * norm.transpose(-1, -2), target_EHTC * norm
    alike.diagonal(dim1=-2, dim2=-1).add_(_JITTER)
    for _ in range(passes):
        order = ranking_EHT.argsort(dim=-1, descending=True, stable=True)
        # Not `cholesky`, which waits for the device to check for failures; the jitter rules them out.
        root = torch.linalg.cholesky_ex(gather_columns(gather_rows(alike, order), order), upper=True).L
        # Solved from the right: a third of the time with LAPACK on a CPU.
        solved = torch.linalg.solve_triangular(
            root, gather_rows(wanted, order).transpose(-1, -2), upper=True, left=False
        )
        gain = torch.linalg.vector_norm(solved, dim=-2).square()
        ranking_EHT = torch.zeros_like(gain).scatter(-1, order, gain)
    return ranking_EHT


def top_tokens(ranking_EHT: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest-ranked tokens, [E, H, count], ascending; ties go to the earlier token."""
    return ranking_EHT.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values


def assignment(alike_EHMT: torch.Tensor, kept_EHM: torch.Tensor) -> torch.Tensor:
    """One-hot assignment of tokens to kept keys by largest similarity, [E, H, T, M]; a kept token is assigned to
    itself."""
    stored = kept_EHM.shape[-1]
    itself = torch.arange(stored, device=kept_EHM.device).expand_as(kept_EHM)
    return F.one_hot(alike_EHMT.argmax(2).scatter(-1, kept_EHM, itself), stored).to(alike_EHMT.dtype)


def fit_masses(rows_EHMQ: torch.Tensor, target_EH1Q: torch.Tensor, start_EHM: torch.Tensor, tile: int) -> torch.Tensor:
    """Masses w [E, H, M] in [1 / tile, tile] that approximately minimise |w rows - target|^2 + s |w - start|^2, where s
    is the mean squared norm of a row.

    A fixed number of steps of accelerated projected gradient (Nesterov): close to the least-squares solution.
    """
    start = start_EHM.clamp(1 / tile, tile)
    gram = products(rows_EHMQ, rows_EHMQ)
    pull = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    wanted = products(rows_EHMQ, target_EH1Q)[..., 0] + pull * start
    # The matrix is non-negative, so its largest row sum bounds its largest eigenvalue.
    rate = 1 / (gram.sum(-1).amax(-1, keepdim=True) + pull)
    weights = ahead = start
    momentum = 1.0
    for _ in range(_STEPS):
        slope = (gram @ ahead[..., None])[..., 0] + pull * ahead - wanted
        moved = (ahead - rate * slope).clamp(1 / tile, tile)
        following = (1 + sqrt(1 + 4 * momentum**2)) / 2
        ahead = moved + (momentum - 1) / following * (moved - weights)
        weights, momentum = moved, following
    return weights
