"""Walsh-Hadamard matrix: an orthonormal rotation that spreads outliers in few channels over all channels.

    H_1 = [1]     H_2n = [[H_n, H_n], [H_n, -H_n]]

The orthonormal form H_n / sqrt(n) is symmetric and its own inverse.
"""

from functools import lru_cache

import torch

from ..errors import ConfigError


@lru_cache
def hadamard(dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix [dim, dim]. All callers share the tensor, so it must not be written to.

    If dim is not a power of two the matrix is block-diagonal, with blocks of dim's largest power-of-two factor (80
    channels: five blocks of 16), and an outlier is spread over its block alone. Hadamard matrices of other sizes (12,
    20, 28, ...) would need tables.

    Raises:
        ConfigError: if dim is odd.
    """
    block = dim & -dim
    if block < 2:
        raise ConfigError(f"{dim} channels cannot be rotated by a Walsh-Hadamard matrix: their number is odd.")
    # A matrix created under torch.inference_mode could never be used with autograd.
    with torch.inference_mode(False):
        small = torch.ones(1, 1, dtype=torch.float64)
        while len(small) < block:
            small = torch.cat([torch.cat([small, small], dim=1), torch.cat([small, -small], dim=1)])
        matrix: torch.Tensor = torch.block_diag(*[small * block**-0.5] * (dim // block))
        return matrix.to(device, dtype)
