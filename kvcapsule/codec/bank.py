"""How a bank of queries reads tiles, and what each token adds to what it reads: what compact capsules choose tokens by."""

from math import prod, sqrt
from typing import NamedTuple

import torch

_JITTER = 1e-4
"""Share of its energy by which a token counts as different from all others: keeps the factorisation of near copies stable in fp32."""
_MASS = 0.3
"""Weight of the tile's mass beside its output where tokens are ranked by what they add, in units of the values' own size."""


class Reading(NamedTuple):
    """How the bank reads tiles whose tokens are all there. fp32, or fp64 for fp64 keys."""

    queries: torch.Tensor
    """[H, Q, D], times the scale of the scores."""
    scores: torch.Tensor
    """[E, H, Q, T]."""
    attention: torch.Tensor
    """A [E, H, Q, T]: their softmax."""
    log_mass: torch.Tensor
    """[E, H, Q, 1]: log of the sum that A was divided by."""
    energy: torch.Tensor
    """[E, H, T]: mean square of a token's column of A."""
    spare: torch.Tensor
    """Memory of A's size, of no meaning."""


class Targets(NamedTuple):
    """What kept tokens have to explain."""

    gram: torch.Tensor
    """A_C^T A_C, [E, H, C, C]."""
    target: torch.Tensor
    """A_C^T of the whole tile's output and mass, [E, H, C, D + 1]."""
    shared: torch.Tensor
    """A_C^T A, [E, H, C, T]."""


def read_by(queries_HQD: torch.Tensor, k_EHTD: torch.Tensor, room: torch.Tensor | None = None) -> Reading:
    """Read tiles with queries that are scaled already; room: memory for three of [E, H, Q, T], which the reading then lives in."""
    first, second, third = (None, None, None) if room is None else room
    scores = torch.matmul(queries_HQD, k_EHTD.to(queries_HQD.dtype).transpose(-1, -2), out=first)
    attention = torch.softmax(scores, -1, out=second)
    # A query's greatest score has its greatest share, at least 1 / T: that takes a third of the time of logsumexp.
    log_mass = scores.amax(-1, keepdim=True) - attention.amax(-1, keepdim=True).log()
    squares = torch.square(attention, out=third)
    return Reading(queries_HQD, scores, attention, log_mass, squares.mean(2), squares)


def targets(reading: Reading, v_EHTD: torch.Tensor, among_EHC: torch.Tensor | None = None) -> Targets:
    """For the tokens `among`, by default for all of the tile."""
    attention, values = reading.attention, v_EHTD.to(reading.attention.dtype)
    if among_EHC is None:
        gram = shared = attention.transpose(-1, -2) @ attention
    else:
        wanted = (*attention.shape[:3], among_EHC.shape[-1])
        columns = columns_at(attention, among_EHC, reading.spare.flatten()[: prod(wanted)].view(wanted))
        shared = columns.transpose(-1, -2) @ attention
        gram = columns_at(shared, among_EHC)
    size = torch.linalg.vector_norm(values.flatten(2), dim=2)[..., None, None] / sqrt(values.shape[2])
    return Targets(gram, torch.cat([shared @ values, _MASS * size * shared.sum(-1, keepdim=True)], dim=-1), shared)


def rows_at(x_EHTN: torch.Tensor, at_EHM: torch.Tensor) -> torch.Tensor:
    """[E, H, M, N], copied whole: `gather` would copy number by number."""
    first = torch.arange(at_EHM[..., 0].numel(), device=at_EHM.device).view(*at_EHM.shape[:2], 1) * x_EHTN.shape[2]
    found: torch.Tensor = x_EHTN.flatten(0, 2).index_select(0, (at_EHM + first).flatten())
    return found.view(*at_EHM.shape, -1)


def columns_at(x_EHNT: torch.Tensor, at_EHC: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """[E, H, N, C]; room: memory to put them in."""
    return torch.gather(x_EHNT, 3, at_EHC[:, :, None].expand(-1, -1, x_EHNT.shape[2], -1), out=room)


def added(gram_EHTT: torch.Tensor, target_EHTC: torch.Tensor, ranking_EHT: torch.Tensor) -> torch.Tensor:
    """What each token explains of the targets that those ranked above it do not, [E, H, T]: one Cholesky factorisation in that order."""
    norm = gram_EHTT.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram_EHTT.dtype).tiny).sqrt()[..., None]
    order = ranking_EHT.argsort(dim=-1, descending=True, stable=True)
    gram = columns_at(rows_at(gram_EHTT / norm / norm.transpose(-1, -2), order), order)
    gram.diagonal(dim1=-2, dim2=-1).add_(_JITTER)
    # Not cholesky: it would wait for the device to look for failures, which the jitter rules out.
    root = torch.linalg.cholesky_ex(gram, upper=True).L
    target = rows_at(target_EHTC / norm, order).transpose(-1, -2)
    # From the right, for which LAPACK on a CPU takes a third of the time.
    gain = torch.linalg.solve_triangular(root, target, upper=True, left=False).square().sum(-2)
    return torch.zeros_like(gain).scatter(-1, order, gain)


def highest(ranking_EHT: torch.Tensor, count: int) -> torch.Tensor:
    """Where the greatest are, [E, H, count] in rising order; of equals the earlier one."""
    return ranking_EHT.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
