"""Cells of few bits as the compiled kernels lay them out, and what they do where no register can be looked up in."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kvcapsule.kernels.native.given import _cells
from kvcapsule.kernels.native.jit import U
from kvcapsule.kernels.native.laid import TILES, at_the_end, lay
from kvcapsule.segments.bit_packing import WIDTHS
from kvcapsule.segments.coefficient_rows import FIRST_KIND, TOGETHER, CodedRows, Coding

_FIELD = {1: 1, 2: 2, 3: 4, 4: 4}


@pytest.mark.parametrize("channels", [1, 3, 21])
@pytest.mark.parametrize("entries", [1, TILES])
def test_each_cell_is_where_its_line_says(channels: int, entries: int) -> None:
    """By channels and by groups; the last entry's last bytes are those of the whole buffer."""
    draw = torch.Generator().manual_seed(channels)
    widths = torch.tensor([0, *WIDTHS])[torch.randint(len(WIDTHS) + 1, (2, 3, channels), generator=draw)].to(torch.uint8)
    coding = Coding(widths, torch.ones(widths.shape), torch.zeros(2, 24, channels))
    codes = torch.randint(256, (entries, 2, 24, channels), generator=draw) % 2 ** widths.long().repeat_interleave(8, 1)
    rows = CodedRows(coding.layout.pack(codes.to(torch.uint8)), coding)
    for runs, of_channels in ((coding.runs_of_channels, True), (coding.runs_of_groups, False)):
        cells = _cells(rows, runs)
        base = np.array([tile % entries * rows.packed.shape[1] for tile in range(TILES)], np.uint64)
        seen = 0
        for set_ in range(2):
            words = np.zeros(TILES * (4 * len(WIDTHS) + 3 * channels), np.uint32)
            lay(cells.packed, base, cells.stretches, U(set_), words, at_the_end())
            for cell, line in zip(cells.cell.tolist(), cells.line.tolist(), strict=True):
                if cell == widths.numel():
                    continue
                group, channel = cell // channels % 3, cell % channels
                width = int(widths.flatten()[cell])
                if cell // channels // 3 != set_ or width not in TOGETHER:
                    continue
                assert line >> 32 == (group if of_channels else channel)
                first = (((line & 2**32 - 1) >> 24) - FIRST_KIND[width]) * 8 * width
                for tile in range(TILES):
                    word = int(words[(line & 2**24 - 1) * TILES + tile])
                    found = [word >> (first + _FIELD[width] * i) & 2**width - 1 for i in range(8)]
                    assert found == codes[tile % entries, set_, 8 * group : 8 * group + 8, channel].tolist()
                seen += 1
        assert seen == int(((widths > 0) & (widths < 8)).sum())


@pytest.mark.slow
def test_without_avx_512(tmp_path: os.PathLike[str]) -> None:
    """The tests of cells for a CPU that has no registers to look up in."""
    env = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma", "NUMBA_CACHE_DIR": str(tmp_path)}
    chosen = ["-k", "widths_of_cells or coded_tiles", "tests/kernels/test_numba_tiles.py"]
    found = subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
