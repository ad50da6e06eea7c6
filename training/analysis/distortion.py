"""Predicted distortion at given bits, by rate-distortion theory for Gaussian coefficients: D(R) = 2^(-2 R) variance.

This is a bound for ideal (vector) codes, and only codes are counted. Scalar uniform quantisers have about 1.5 times the
error at 1 bit and twice at 2 (kvcapsule.codec.bit_allocation); coefficients with heavier tails than a Gaussian may do
better. Bases and variances are evaluated on the questions that they were measured on, which makes the prediction
optimistic; docs/analyze.md says by how much.
"""

from typing import NamedTuple

import torch

from kvcapsule.codec.bit_allocation import water_fill
from kvcapsule.codec.kvcapsule import retained

from .spectrum import TileMoments

FULL_BITS = 16
"""Bits per element of the full cache, and of the rows of token PCA."""
BITS = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Bits per element of the keys (or the values): 80x, 40x, 20x, 10x and 5x less than FULL_BITS."""


class Predicted(NamedTuple):
    """Predicted unexplained variance of one layer's keys or values at given bits, in [0, 1]."""

    transform: float
    """Transform code: token basis x channel basis, bits by reverse water-filling over all heads of the layer."""
    per_channel: float
    """Per-channel quantisation: the same bits for every element, each channel about its mean over the tile; scales and
    minimums are not counted."""
    token_pca: float
    """PCA along the tokens: as many principal components, as rows of FULL_BITS, as the bits allow (at least one),
    without rounding."""


def predict(moments: TileMoments, variances: torch.Tensor, bits: float) -> Predicted:
    """Predict the distortion at `bits` per element. variances [H, T, D]: of the coefficients, about their means, which
    a codec stores once as its offset."""
    total = moments.variance()
    if total <= 0:
        return Predicted(0.0, 0.0, 0.0)
    rows = retained(bits / FULL_BITS, moments.tile)
    lost = torch.linalg.eigvalsh(moments.tokens()).clamp_min(0)[:, : moments.tile - rows].sum()
    values = (water_fill(variances, bits).distortion, 2 ** (-2 * bits) * moments.variance_within(), float(lost))
    return Predicted(*(min(1.0, value / total) for value in values))


def fixed_share(moments: TileMoments, variances: torch.Tensor) -> float:
    """Share of the variance that is the same in every tile (the mean tile about its mean), which a codec stores
    once."""
    total = moments.variance()
    return max(0.0, 1 - float(variances.sum()) / total) if total > 0 else 0.0
