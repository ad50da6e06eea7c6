"""The kernels compile for a GPU: the interpreter knows neither types of loops nor shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
SPILLED = 256
"""Bytes a thread at most: rows of 8 bits do not quite fit into the registers."""


@pytest.mark.parametrize(
    "options", ["--arch 90 --dtype float16 --bits 4", pytest.param("--dtype float16 bfloat16", marks=pytest.mark.slow)]
)
def test_every_kernel_compiles(options: str, tmp_path: Path) -> None:
    """In a process of its own: here the kernels are interpreted. Single precision may spill, as it is for tests."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "compile_kernels.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent, timeout=1800)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[1] for line in lines} == {
        "attend_rows",
        "combine",
        "derotate_queries",
        "score_rows",
        "map_scores",
        "weigh_rows",
    }
    spilled = [" ".join(line) for line in lines if int(line[3].removeprefix("STACK:")) > SPILLED]
    assert not spilled, "\n".join(spilled)
    assert max(int(line[-1]) for line in lines) < 100 << 10, "an A100 has 163 KB of shared memory, most other GPUs 99"
