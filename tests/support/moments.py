"""Moments of random tiles, as `kvcapsule analyze` gathers them."""

import torch

from kvcapsule.training.analysis.spectrum import TileMoments
from kvcapsule.training.second_moments import CoefficientMoments

CPU = torch.device("cpu")


def moments_of(x_EHTD: torch.Tensor) -> TileMoments:
    moments = TileMoments(*x_EHTD.shape[1:], CPU)
    for part in x_EHTD.split(300):
        moments.add(part)
    return moments


def variances_of(x_EHTD: torch.Tensor) -> torch.Tensor:
    gathered = CoefficientMoments(*x_EHTD.shape[1:])
    gathered.add(moments_of(x_EHTD).moments.bases().coefficients(x_EHTD))
    return gathered.variance()
