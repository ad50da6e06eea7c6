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
from triton.compiler import ASTSource

from kvcapsule.kernels.fused import rowed
from kvcapsule.kernels.fused.attend import attend
from kvcapsule.kernels.fused.packing import pack
from kvcapsule.segments.coefficient_rows import CodedRows, Coding
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
HEADS, GROUP, DIM, ENTRIES = 4, 7, 128, 2


class Compiler:
    """In the place of JITFunction.run: notes what would be launched, and compiles it once."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.found: dict[str, Any] = {}

    def run(self, fn: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        signature, constexprs, attrs = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(fn.params, [*args, *(constants[p.name] for p in fn.params[len(args) :])], strict=True)):
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constexprs[(i,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            elif value == 1 and not parameter.do_not_specialize:
                signature[parameter.name] = "constexpr"
                constexprs[(i,)] = 1
            else:
                signature[parameter.name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        key = f"{fn.__name__} {sorted(signature.items())} {constexprs} {attrs}"
        if key not in self.found:
            source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
            self.found[key] = triton.compile(source, target=GPUTarget("cuda", self.arch, 32))


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
        yield [Segment(QuantizedRows.pack(rows.keys, bits), QuantizedRows.pack(rows.values, bits), owner, bias=rows.bias), tail]
    angle = torch.randn(ENTRIES, DIM // 2, generator=generator)
    frame = Frame(angle.cos(), angle.sin())
    yield [Segment(rows.keys, rows.values, owner, frame=frame, out_map=rand(HEADS, DIM, DIM)), tail]
    maps = {"score_map": rand(HEADS, 196, 64), "value_map": rand(HEADS, 196, 64), "value_mean": rand(HEADS, DIM)}
    yield [Segment(rows.keys, rows.values, owner, frame=frame, **maps), tail]
    one = Segment(
        rand(1, HEADS, 1, DIM), rand(1, HEADS, 1, DIM), owner[:1], bias=rand(1, HEADS, 1), mask=torch.ones(1, 1, dtype=torch.bool)
    )
    tiny = {"score_map": rand(1, 1, 1), "value_map": rand(1, 1, 1)}
    # A size of 1 is known to the compiler, and must still be a number to it.
    yield [one]
    yield [replace(one, **tiny), one]
    packed = QuantizedRows.pack(rows.keys, 4), QuantizedRows.pack(rows.values, 4)
    yield [Segment(*packed, owner, **maps), tail]
    for joint, widest in ((1, 8), (4, 4)):
        sets, channels = HEADS // joint, 64

        def coded(groups: int, sets: int = sets, channels: int = channels, joint: int = joint, widest: int = widest) -> CodedRows:
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
    compiler = Compiler(arch)
    triton.JITFunction.run = lambda fn, *args, **options: compiler.run(fn, *args, **options)
    rowed._items = lambda device: 64
    with torch.no_grad():
        for dtype in dtypes:
            query = torch.randn(2, HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
            for kind in segments(dtype, widths):
                attend(query, kind, DIM**-0.5)
            attend(query, kind[1:], DIM**-0.5, torch.ones(2, 1, 100, dtype=torch.bool))
        for bits in widths:
            pack(torch.zeros(100, 8, dtype=torch.uint8), bits)
    return compiler.found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2, 1])
    options = parser.parse_args()
    for arch in options.arch:
        for key, kernel in compiled(arch, [getattr(torch, name) for name in options.dtype], options.bits).items():
            print(f"sm_{arch}", key.split()[0], usage(kernel), f"shared {kernel.metadata.shared}")
