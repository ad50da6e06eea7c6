"""Cells of few bits as the CPU's kernels lay them out, and kernels for CPUs without AVX-512."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcapsule.kernels.cpu.arguments import Builder
from kvcapsule.kernels.cpu.cell_words import FIRST_KIND, PER_WORD, cell_tables
from kvcapsule.segments.bit_packing import WIDTHS
from kvcapsule.segments.coefficient_rows import CodedRows, Coding

TILES = 8
_FIELD = {1: 1, 2: 2, 3: 4, 4: 4}


@pytest.mark.parametrize("channels", [1, 3, 21])
@pytest.mark.parametrize("entries", [1, TILES])
def test_each_cell_is_where_its_line_says(channels: int, entries: int, probe: ctypes.CDLL) -> None:
    """By channels and by groups; the last entry's last bytes are those of the whole buffer."""
    draw = torch.Generator().manual_seed(channels)
    widths = torch.tensor([0, *WIDTHS])[torch.randint(len(WIDTHS) + 1, (2, 3, channels), generator=draw)].to(
        torch.uint8
    )
    coding = Coding(widths, torch.ones(widths.shape), torch.zeros(2, 24, channels))
    codes = torch.randint(256, (entries, 2, 24, channels), generator=draw) % 2 ** widths.long().repeat_interleave(8, 1)
    rows = CodedRows(coding.layout.pack(codes.to(torch.uint8)), coding)
    for of_channels in (True, False):
        tables, builder = cell_tables(coding, of_channels), Builder()
        struct = builder.rows(rows, of_channels)
        base = np.array([tile % entries * rows.packed.shape[1] for tile in range(TILES)], np.int64)
        seen = 0
        for set_ in range(2):
            words = np.zeros(TILES * (4 * len(WIDTHS) + 3 * channels), np.uint32)
            probe.probe_words(
                ctypes.byref(struct), ctypes.c_void_p(base.ctypes.data), set_, ctypes.c_void_p(words.ctypes.data)
            )
            for block, (few, eight, _) in enumerate(tables.bounds.view(2, -1, 3)[set_].tolist()):
                for line in tables.cells[few:eight].tolist():
                    met = line >> 32
                    group, channel = (met, block) if of_channels else (block, met)
                    width = int(widths[set_, group, channel])
                    if width not in PER_WORD:
                        assert width == 0 and not of_channels
                        continue
                    first = (((line & 2**32 - 1) >> 24) - FIRST_KIND[width]) * 8 * width
                    for tile in range(TILES):
                        word = int(words[(line & 2**24 - 1) * TILES + tile])
                        found = [word >> (first + _FIELD[width] * i) & 2**width - 1 for i in range(8)]
                        assert found == codes[tile % entries, set_, 8 * group : 8 * group + 8, channel].tolist()
                    seen += 1
        assert seen == int(((widths > 0) & (widths < 8)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["haswell", "x86-64"])
def test_without_avx_512(target: str, tmp_path: Path) -> None:
    """The tests of all kinds of rows, compiled for CPUs whose registers hold fewer numbers."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/bash\nexec c++ "${{@/-march=native/-march={target}}}"\n')
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "KVCAPSULE_CACHE": str(tmp_path)}
    chosen = [str(Path(__file__).with_name(name)) for name in ("test_cpu.py", "test_cpu_tiles.py")]
    found = subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
