"""How a bank of queries reads tiles, and what each token adds to what it reads: what compact capsules choose tokens
by."""

from math import sqrt
from typing import NamedTuple

import torch

_JITTER = 1e-4
"""Share of its energy by which a token counts as different from all others: keeps the factorisation of near copies
stable in fp32."""
_MASS = 0.3
"""Weight of the tile's mass beside its output where tokens are ranked by what they add, in units of the values' own
size."""


class Reading(NamedTuple):
    """How the bank reads tiles whose tokens are all there. fp32, or fp64 for fp64 keys.

    Tokens are outside and queries inside: whatever is taken over few tokens, or of a choice of them, then goes along
    the memory. The two axes before them may as well be of heads and tiles, where the queries are [H, 1, Q, D].
    """

    queries: torch.Tensor
    """[H, Q, D], times the scale of the scores."""
    scores: torch.Tensor
    """[E, H, T, Q]."""
    attention: torch.Tensor
    """A^T [E, H, T, Q]: their softmax over the tokens."""
    log_mass: torch.Tensor
    """[E, H, 1, Q]: log of the sum that A was divided by."""
    energy: torch.Tensor
    """[E, H, T]: mean square of what a token gets."""
    mass: torch.Tensor
    """[E, H, T]: mean of what a token gets."""


class Targets(NamedTuple):
    """What kept tokens have to explain."""

    gram: torch.Tensor
    """A_C^T A_C, [E, H, C, C]."""
    target: torch.Tensor
    """A_C^T of the whole tile's output and mass, [E, H, C, D + 1]."""
    shared: torch.Tensor
    """A_C^T A, [E, H, C, T]."""


def read_by(queries_HQD: torch.Tensor, k_EHTD: torch.Tensor, room: torch.Tensor | None = None) -> Reading:
    """Read tiles with queries that are scaled already; room: memory for two of [E, H, T, Q], which the reading then
    lives in."""
    keys = k_EHTD.to(queries_HQD.dtype)
    first, second = (None, None) if room is None else room
    if queries_HQD.dim() == 4:
        # One product a head: for one a tile, PyTorch would repeat the queries.
        room = None if first is None else first.flatten(1, 2)
        scores = torch.matmul(keys.flatten(1, 2), queries_HQD[:, 0].transpose(-1, -2), out=room).unflatten(
            1, keys.shape[1:3]
        )
    else:
        scores = torch.matmul(keys, queries_HQD.transpose(-1, -2))
    attention = torch.softmax(scores, -2, out=second)
    # A query's greatest score has its greatest share, at least 1 / T: that takes a third of the time of logsumexp.
    log_mass = scores.amax(-2, keepdim=True) - attention.amax(-2, keepdim=True).log()
    energy = torch.linalg.vector_norm(attention, dim=-1).square() / attention.shape[-1]
    return Reading(queries_HQD, scores, attention, log_mass, energy, attention.mean(-1))


def targets(reading: Reading, v_EHTD: torch.Tensor, among_EHC: torch.Tensor | None = None) -> Targets:
    """For the tokens `among`, by default for all of the tile."""
    attention, values = reading.attention, v_EHTD.to(reading.attention.dtype)
    chosen = attention if among_EHC is None else rows_at(attention, among_EHC)
    shared = products(chosen, attention)
    gram = shared if among_EHC is None else columns_at(shared, among_EHC)
    size = torch.linalg.vector_norm(values, dim=(2, 3))[..., None, None] / sqrt(values.shape[2])
    target = shared.new_empty(*shared.shape[:3], values.shape[3] + 1)
    torch.matmul(shared, values, out=target[..., :-1])
    torch.mul(shared.sum(-1, keepdim=True), _MASS * size, out=target[..., -1:])
    return Targets(gram, target, shared)


def products(x_EHMQ: torch.Tensor, y_EHTQ: torch.Tensor) -> torch.Tensor:
    """[E, H, M, T]: of each row of x with each of y."""
    return x_EHMQ @ y_EHTQ.transpose(-1, -2)


def rows_at(x_EHTN: torch.Tensor, at_EHM: torch.Tensor) -> torch.Tensor:
    """[E, H, M, N], copied whole: `gather` would copy number by number."""
    first = torch.arange(at_EHM[..., 0].numel(), device=at_EHM.device).view(*at_EHM.shape[:2], 1) * x_EHTN.shape[2]
    found: torch.Tensor = x_EHTN.flatten(0, 2).index_select(0, (at_EHM + first).flatten())
    return found.view(*at_EHM.shape, -1)


def columns_at(x_EHNT: torch.Tensor, at_EHC: torch.Tensor) -> torch.Tensor:
    """[E, H, N, C]."""
    return torch.gather(x_EHNT, 3, at_EHC[:, :, None].expand(-1, -1, x_EHNT.shape[2], -1))


def added(
    gram_EHTT: torch.Tensor, target_EHTC: torch.Tensor, ranking_EHT: torch.Tensor, passes: int = 1
) -> torch.Tensor:
    """What each token explains of the targets that those ranked above it do not, [E, H, T]: one Cholesky factorisation
    in that order.

    It is a ranking itself: with more passes, tokens are put in its order again.
    """
    norm = gram_EHTT.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram_EHTT.dtype).tiny).rsqrt()[..., None]
    alike, wanted = gram_EHTT * norm * norm.transpose(-1, -2), target_EHTC * norm
    alike.diagonal(dim1=-2, dim2=-1).add_(_JITTER)
    for _ in range(passes):
        order = ranking_EHT.argsort(dim=-1, descending=True, stable=True)
        # Not cholesky: it would wait for the device to look for failures, which the jitter rules out.
        root = torch.linalg.cholesky_ex(columns_at(rows_at(alike, order), order), upper=True).L
        # From the right, for which LAPACK on a CPU takes a third of the time.
        solved = torch.linalg.solve_triangular(root, rows_at(wanted, order).transpose(-1, -2), upper=True, left=False)
        gain = torch.linalg.vector_norm(solved, dim=-2).square()
        ranking_EHT = torch.zeros_like(gain).scatter(-1, order, gain)
    return ranking_EHT


def highest(ranking_EHT: torch.Tensor, count: int) -> torch.Tensor:
    """Where the greatest are, [E, H, count] in rising order; of equals the earlier one."""
    return ranking_EHT.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
