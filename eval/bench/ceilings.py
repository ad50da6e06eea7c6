"""What the machine can do at most, measured in the same run: bytes a second, and multiply-adds."""

from statistics import median
from typing import Any

import torch

from .interleaved_timing import Contender, interleave, last_level_cache

_ROUNDS = 7
_LEAST = 256 * 2**20
"""Bytes of what is read or copied, or four times the last-level cache where that is more."""
_MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices, by type of device."""


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The best of several ways to read, a copy (read and written bytes count), and a square matrix product; 10^9 a
    second.

    Medians of the readings, like all other times.
    """
    count = max(_LEAST, 4 * last_level_cache(device)) // 4
    source, target = torch.rand(count, device=device), torch.rand(count, device=device)
    rows = source.view(-1, 1024)
    vector = torch.rand(1024, device=device)
    side = _MATRIX[device.type]
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    found = interleave(
        [
            Contender("sum", [source.sum]),
            Contender("product", [lambda: rows @ vector]),
            Contender("copy", [lambda: target.copy_(source)]),
            Contender("matmul", [lambda: left @ right]),
        ],
        device,
        _ROUNDS,
        60.0,
    )
    seconds = {name: median(times.rounds) for name, times in found.items()}
    return {
        "read_gb_s": source.nbytes / min(seconds["sum"], seconds["product"]) / 1e9,
        "copy_gb_s": 2 * source.nbytes / seconds["copy"] / 1e9,
        "matmul_gflop_s": 2 * side**3 / seconds["matmul"] / 1e9,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(device),
    }
