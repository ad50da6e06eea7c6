"""The Walsh-Hadamard matrix: an orthonormal rotation that spreads what is large in few channels over all of them.

    H_1 = [1]     H_2n = [[H_n, H_n], [H_n, -H_n]]

and, orthonormal, H_n / sqrt(n): symmetric, and its own inverse.
"""

from functools import lru_cache

import torch


@lru_cache
def hadamard(dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix [dim, dim]; all callers share it, so it is to be read only.

    For a dim that is no power of two: blocks along the diagonal of its largest factor that is one (80 channels: five
    blocks of 16). An outlier is then spread over its block alone. Factors that no power of two has (12, 20, 28, ...)
    would need tables of matrices.

    Raises:
        ValueError: for an odd dim, which has no such block.
    """
    block = dim & -dim
    if block < 2:
        raise ValueError(f"{dim} channels cannot be rotated by a Walsh-Hadamard matrix: their number is odd.")
    # Made under torch.inference_mode, the shared matrix would be refused by autograd ever after.
    with torch.inference_mode(False):
        small = torch.ones(1, 1, dtype=torch.float64)
        while len(small) < block:
            small = torch.cat([torch.cat([small, small], dim=1), torch.cat([small, -small], dim=1)])
        whole: torch.Tensor = torch.block_diag(*[small * block**-0.5] * (dim // block))
        return whole.to(device, dtype)
