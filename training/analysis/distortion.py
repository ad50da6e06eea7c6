"""What rate-distortion theory promises at given bits, for Gaussian coefficients: D(R) = 2^(-2 R) of the variance.

A bound for ideal (vector) codes, and nothing but codes is counted. Uniform quantisers that take numbers one by one
leave about 1.5 times the error at 1 bit and twice at 2 (kvcapsule.codec.bit_allocation); coefficients with heavier
tails than a Gaussian's may do better. Bases and variances are judged on the questions that they were measured on, which
flatters them: docs/analyze.md says by how much.
"""

from typing import NamedTuple

import torch

from kvcapsule.codec.bit_allocation import water_fill
from kvcapsule.codec.kvcapsule import retained

from .spectrum import TileMoments

FULL_BITS = 16
"""Bits of an element of the full cache, and of the rows that token PCA keeps."""
BITS = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Bits for each element of the keys (or the values): 80x, 40x, 20x, 10x and 5x less than FULL_BITS."""


class Predicted(NamedTuple):
    """Unexplained variance of one layer's keys or values at some bits, in [0, 1]."""

    transform: float
    """Token basis x channel basis, bits by reverse water-filling over a layer's heads together."""
    per_channel: float
    """The same bits for every element, each channel about its mean over the tile; steps and zeros are not counted."""
    token_pca: float
    """The first principal components along the tokens as rows of FULL_BITS, as many as the bits pay for (at least one),
    and no rounding."""


def predict(moments: TileMoments, variances: torch.Tensor, bits: float) -> Predicted:
    """variances [H, T, D]: of the coefficients, about their own means (a codec's offsets cost nothing a tile)."""
    whole = moments.variance()
    if whole <= 0:
        return Predicted(0.0, 0.0, 0.0)
    rows = retained(bits / FULL_BITS, moments.tile)
    lost = torch.linalg.eigvalsh(moments.tokens()).clamp_min(0)[:, : moments.tile - rows].sum()
    found = (water_fill(variances, bits).distortion, 2 ** (-2 * bits) * moments.variance_within(), float(lost))
    return Predicted(*(min(1.0, value / whole) for value in found))


def fixed_share(moments: TileMoments, variances: torch.Tensor) -> float:
    """Share of the variance that is the same in every tile (the mean tile about its mean): a codec stores it once and
    for all."""
    whole = moments.variance()
    return max(0.0, 1 - float(variances.sum()) / whole) if whole > 0 else 0.0
