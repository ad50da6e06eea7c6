"""Bits of transform coefficients: reverse water-filling (Cover and Thomas, chapter 10), ideal and with real widths.

The ideal rule (`water_fill`, `bits_for`) gives the least error that any code of Gaussian components can reach. The
real one (`allocate`) buys widths of bit-packed cells, each where it lowers the error most for its bytes.

H heads or sets of them, T token components, D channels, G cells of eight token components.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from ..segments.bit_packing import GROUP, WIDTHS

DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.0000877}
"""Squared error of the best uniform quantiser of so many bits, as a share of a Gaussian's variance (Max, 1960; 8 bits:
Jayant and Noll)."""
SCALE = {0: 1.0, 1: 1.5956, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
"""Its scale (the distance of two levels), in standard deviations."""
WIDEST = 8
"""The width whose cells cover the largest coefficient seen: it costs next to nothing there, and at fewer bits more in
rounding than clipping does."""
MARGIN = 1.25
"""How much farther they reach than that: a new page's coefficients are seldom greater by more (training/NOTES.md)."""


class Water(NamedTuple):
    """Reverse water-filling of independent Gaussian components."""

    level: float
    """Components below it are left out; all others are coded down to this error."""
    distortion: float
    """Sum of the squared errors."""


def water_fill(variances: torch.Tensor, bits: float) -> Water:
    """The least error that `bits` a component (mean over all of them) can reach."""
    count = variances.numel()
    ranked = _ranked(variances)
    if not len(ranked):
        return Water(0.0, 0.0)
    coded = torch.arange(1, len(ranked) + 1, dtype=ranked.dtype, device=ranked.device)
    # With the first k coded, their levels follow from the bits; k is right as long as the k-th lies above the level.
    levels = (ranked.log2().cumsum(0) / coded - 2 * count * bits / coded).exp2()
    k = max(1, int((levels <= ranked).sum()))
    level = float(levels[k - 1])
    return Water(level, k * level + float(ranked[k:].sum()))


def bits_for(variances: torch.Tensor, distortion: float) -> float:
    """The bits a component (mean over all of them) at which `water_fill` comes to this distortion; infinite for one
    that no bits reach."""
    ranked = _ranked(variances)
    if distortion >= float(ranked.sum()):
        return 0.0
    coded = torch.arange(1, len(ranked) + 1, dtype=ranked.dtype, device=ranked.device)
    # What the components behind the first k lose, added up from the least.
    left = ranked.flip(0).cumsum(0).flip(0) - ranked
    levels = (distortion - left) / coded
    k = max(1, int((levels <= ranked).sum()))
    return float((ranked[:k] / levels[k - 1].clamp_min(0)).log2().sum()) / 2 / variances.numel()


def _ranked(variances: torch.Tensor) -> torch.Tensor:
    """The positive ones in fp64, the greatest first."""
    ranked = variances.double().flatten().sort(descending=True).values
    return ranked[ranked > 0]


def cell_variance(variance_HTD: torch.Tensor) -> torch.Tensor:
    """Sum of the variances in each cell of eight token components: [H, ceil(T / 8), D]."""
    padded = torch.nn.functional.pad(variance_HTD, (0, 0, 0, -variance_HTD.shape[1] % GROUP))
    return padded.unflatten(1, (-1, GROUP)).sum(2)


def cell_reach(reach_HTD: torch.Tensor) -> torch.Tensor:
    """The greatest reach in each cell of eight token components: [H, ceil(T / 8), D]."""
    padded = torch.nn.functional.pad(reach_HTD, (0, 0, 0, -reach_HTD.shape[1] % GROUP))
    return padded.unflatten(1, (-1, GROUP)).amax(2)


def allocate(costs: Sequence[torch.Tensor], budget: int) -> list[torch.Tensor]:
    """Widths of cells that make the total cost least for the bytes spent.

    Args:
        costs: of each source [H, G, D], the cost of leaving each cell out; a cell of width w keeps DISTORTION[w] of it
            and takes w bytes. One that costs nothing gets none.
        budget: bytes of all cells of all sources for one tile.

    Returns: uint8 widths of each source, [H, G, D].
    """
    flat = torch.cat([c.flatten().cpu() for c in costs]).double()
    ladder = (0, *WIDTHS)
    rises = [b - a for a, b in pairwise(ladder)]
    gains = torch.stack([flat * (DISTORTION[a] - DISTORTION[b]) / (b - a) for a, b in pairwise(ladder)])
    # DISTORTION falls ever more slowly, so a cell's rises are bought in their order.
    order = gains.flatten().argsort(descending=True, stable=True)
    price = torch.tensor(rises)[:, None].expand_as(gains).flatten()[order]
    bought = torch.zeros(gains.numel(), dtype=torch.uint8)
    bought[order[(price.cumsum(0) <= budget) & (gains.flatten()[order] > 0)]] = 1
    widths = (bought.view(len(rises), -1) * torch.tensor(rises, dtype=torch.uint8)[:, None]).sum(0, dtype=torch.uint8)
    return [w.view(c.shape) for w, c in zip(widths.split([c.numel() for c in costs]), costs, strict=True)]


def distortion(widths: torch.Tensor) -> torch.Tensor:
    """DISTORTION of each width, elementwise."""
    table = torch.zeros(9, dtype=torch.float64)
    for width, share in DISTORTION.items():
        table[width] = share
    return table[widths.long().cpu()]


def cell_scale(widths: torch.Tensor, deviation: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Scales of cells of given widths, standard deviations and greatest distances from the mean.

    They are optimal for a Gaussian, whose best scale clips what lies far out. Real coefficients have heavier tails: one
    that is clipped by several standard deviations can change an answer, however many bits the others have. Cells of 8
    bits are so fine that they can cover all.
    """
    table = torch.zeros(9, dtype=deviation.dtype)
    for width, scale in SCALE.items():
        table[width] = scale
    scales = table.to(deviation.device)[widths.long()] * deviation
    covering = MARGIN * reach / ((2**WIDEST - 1) / 2)
    return torch.where(widths == WIDEST, torch.maximum(scales, covering.to(scales.dtype)), scales)
