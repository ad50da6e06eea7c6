"""Compile every kernel for a GPU that need not be there, and print the registers, stack and shared memory of each.

    python tests/compile_kernels.py [--arch 80 90] [--dtype float16 bfloat16 float32] [--bits 8 4 3 2 1]

Runs attention over segments of every form with launches that compile and do not run. Not with TRITON_INTERPRET: nothing would be compiled.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from support.builders import random_widths
from triton.backends.compiler import GPUTarget

from kvcapsule.kernels.triton import row_launch
from kvcapsule.kernels.triton.attend import attend
from kvcapsule.segments.coefficient_rows import CodedRows, Coding
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment

HEADS, GROUP, DIM, ENTRIES = 4, 7, 128, 2


class Driver:
    """A GPU that is not there, for Triton's launcher: kernels are specialised and compiled for it as for a real one, and do not run."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def usage(compiled: Any) -> str:
    """Registers, stack and spills, as the tool beside ptxas tells."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return "no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return next(line.strip() for line in told.splitlines() if "REG:" in line)


def segments(dtype: torch.dtype, widths: list[int]) -> Iterator[list[Segment]]:
    """A capsule of each form beside a tail."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    owner = torch.arange(ENTRIES)
    tail = Segment(rand(2, HEADS, 100, DIM), rand(2, HEADS, 100, DIM), torch.arange(2))
    rows = Segment(rand(ENTRIES, HEADS, 64, DIM), rand(ENTRIES, HEADS, 64, DIM), owner, bias=rand(ENTRIES, HEADS, 64))
    yield [rows, tail]
    for bits in widths:
        yield [
            Segment(QuantizedRows.pack(rows.keys, bits), QuantizedRows.pack(rows.values, bits), owner, bias=rows.bias),
            tail,
        ]
    angle = torch.randn(ENTRIES, DIM // 2, generator=generator)
    frame = Frame(angle.cos(), angle.sin())
    yield [Segment(rows.keys, rows.values, owner, frame=frame, out_map=rand(HEADS, DIM, DIM)), tail]
    maps = {"score_map": rand(HEADS, 196, 64), "value_map": rand(HEADS, 196, 64), "value_mean": rand(HEADS, DIM)}
    yield [Segment(rows.keys, rows.values, owner, frame=frame, **maps), tail]
    one = Segment(
        rand(1, HEADS, 1, DIM),
        rand(1, HEADS, 1, DIM),
        owner[:1],
        bias=rand(1, HEADS, 1),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    tiny = {"score_map": rand(1, 1, 1), "value_map": rand(1, 1, 1)}
    # A size of 1 is known to the compiler, and must still be a number to it.
    yield [one]
    yield [replace(one, **tiny), one]
    packed = QuantizedRows.pack(rows.keys, 4), QuantizedRows.pack(rows.values, 4)
    yield [Segment(*packed, owner, **maps), tail]
    for joint, widest in ((1, 8), (4, 4)):
        sets, channels = HEADS // joint, 64

        def coded(
            groups: int, sets: int = sets, channels: int = channels, joint: int = joint, widest: int = widest
        ) -> CodedRows:
            widths = random_widths((sets, groups, channels), generator).clamp(max=widest)
            coding = Coding(widths, rand(sets, groups, channels).abs(), rand(sets, 8 * groups, channels), joint)
            return CodedRows.encode(torch.randn(ENTRIES, sets, 8 * groups, channels, generator=generator), coding)

        yield [
            Segment(
                coded(8), coded(12), owner, frame=frame, score_map=rand(sets, 196, 64), value_map=rand(sets, 196, 96),
                q_map=rand(HEADS, DIM, channels), out_map=rand(HEADS, channels, DIM),
            ),
            tail,
        ]  # fmt: skip


def compiled(arch: int, dtypes: list[torch.dtype], widths: list[int]) -> dict[str, Any]:
    """Every kernel that these launches need, by name and hash."""
    launch = triton.JITFunction.run
    kernels: dict[str, Any] = {}

    def compile_only(fn: Any, *args: Any, **options: Any) -> None:
        kernel = launch(fn, *args, **options | {"warmup": True})
        kernels[f"{fn.__name__} {kernel.hash}"] = kernel

    triton.runtime.driver.set_active(Driver(arch))
    triton.JITFunction.run = compile_only
    row_launch._items = lambda device: 64
    with torch.no_grad():
        for dtype in dtypes:
            query = torch.randn(2, HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
            for kind in segments(dtype, widths):
                attend(query, kind, DIM**-0.5)
            attend(query, kind[1:], DIM**-0.5, torch.ones(2, 1, 100, dtype=torch.bool))
    triton.JITFunction.run = launch
    return kernels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2, 1])
    options = parser.parse_args()
    for arch in options.arch:
        for key, kernel in compiled(arch, [getattr(torch, name) for name in options.dtype], options.bits).items():
            print(f"sm_{arch}", key.split()[0], usage(kernel), f"shared {kernel.metadata.shared}")
