"""Reverse water-filling: which cells of a transform code get how many bits (Cover and Thomas, chapter 10; greedy over
real widths)."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from kvcapsule.segments.bit_packing import GROUP, WIDTHS

DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.0000877}
"""Squared error of the best uniform quantiser of so many bits, as a share of a Gaussian's variance (Max, 1960; 8 bits:
Jayant and Noll)."""
STEP = {0: 1.0, 1: 1.5956, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
"""Its step, in standard deviations."""
REACHING = 8
"""The width whose cells reach what was seen: it costs next to nothing there, and at fewer bits more in rounding than
clipping does."""
MARGIN = 1.25
"""How much farther they reach than that: a new page's coefficients are seldom greater by more (training/NOTES.md)."""


def cell_variance(variance_HTD: torch.Tensor) -> torch.Tensor:
    """Sum of the variances in each cell of eight token components: [H, ceil(T / 8), D]."""
    padded = torch.nn.functional.pad(variance_HTD, (0, 0, 0, -variance_HTD.shape[1] % GROUP))
    return padded.unflatten(1, (-1, GROUP)).sum(2)


def cell_reach(reach_HTD: torch.Tensor) -> torch.Tensor:
    """The greatest reach in each cell of eight token components: [H, ceil(T / 8), D]."""
    padded = torch.nn.functional.pad(reach_HTD, (0, 0, 0, -reach_HTD.shape[1] % GROUP))
    return padded.unflatten(1, (-1, GROUP)).amax(2)


def allocate(costs: Sequence[torch.Tensor], budget: int) -> list[torch.Tensor]:
    """Widths of cells that make the whole cost least for the bytes spent.

    Args:
        costs: of each unit [H, G, D], the cost of leaving each cell out; a cell of width w keeps DISTORTION[w] of it
            and takes w bytes. One that costs nothing gets none.
        budget: bytes of all cells of all units for one tile.

    Returns: uint8 widths of each unit, [H, G, D].
    """
    flat = torch.cat([c.flatten().cpu() for c in costs]).double()
    ladder = (0, *WIDTHS)
    steps = [b - a for a, b in pairwise(ladder)]
    gains = torch.stack([flat * (DISTORTION[a] - DISTORTION[b]) / (b - a) for a, b in pairwise(ladder)])
    # DISTORTION falls ever more slowly, so a cell's steps are bought in their order.
    order = gains.flatten().argsort(descending=True, stable=True)
    price = torch.tensor(steps)[:, None].expand_as(gains).flatten()[order]
    bought = order[(price.cumsum(0) <= budget) & (gains.flatten()[order] > 0)]
    taken = torch.zeros(gains.numel(), dtype=torch.uint8)
    taken[bought] = 1
    widths = (taken.view(len(steps), -1) * torch.tensor(steps, dtype=torch.uint8)[:, None]).sum(0, dtype=torch.uint8)
    return [w.view(c.shape) for w, c in zip(widths.split([c.numel() for c in costs]), costs, strict=True)]


def distortion(widths: torch.Tensor) -> torch.Tensor:
    """DISTORTION of each width, elementwise."""
    table = torch.zeros(9, dtype=torch.float64)
    for width, share in DISTORTION.items():
        table[width] = share
    return table[widths.long().cpu()]


def step_size(widths: torch.Tensor, deviation: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Steps of cells of given widths, standard deviations and greatest distances from the mean.

    A Gaussian's best step clips what lies far out, and real coefficients have tails that a Gaussian has not: one that
    is clipped by several standard deviations can change an answer, however many bits the others have. Cells of 8 bits
    are so fine that they can reach them all.
    """
    table = torch.zeros(9, dtype=deviation.dtype)
    for width, step in STEP.items():
        table[width] = step
    steps = table.to(deviation.device)[widths.long()] * deviation
    reaching = MARGIN * reach / ((2**REACHING - 1) / 2)
    return torch.where(widths == REACHING, torch.maximum(steps, reaching.to(steps.dtype)), steps)
