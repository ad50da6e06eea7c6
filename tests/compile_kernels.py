"""Compile every kernel for a GPU that need not be there, and print the registers, stack and shared memory of each.

    python tests/compile_kernels.py [--arch 80 90] [--dtype float16 bfloat16 float32] [--bits 8 4 3 2 1]

Runs attention over segments of every form with launches that compile and do not run. Not with TRITON_INTERPRET: nothing
would be compiled.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from support.triton_cases import DIM, forms, query_of_form
from triton.backends.compiler import GPUTarget

from kvcapsule.kernels.triton import row_launch
from kvcapsule.kernels.triton.attend import attend


class Driver:
    """A GPU that is not there, for Triton's launcher: kernels are specialised and compiled as for a real one."""

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


def compiled(arch: int, dtypes: list[torch.dtype], widths: tuple[int, ...]) -> dict[str, Any]:
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
            query = query_of_form(dtype)
            for segments in forms(dtype, widths).values():
                attend(query, segments, DIM**-0.5)
            attend(query, segments[1:], DIM**-0.5, torch.ones(2, 1, 100, dtype=torch.bool))
    triton.JITFunction.run = launch
    return kernels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2, 1])
    options = parser.parse_args()
    for arch in options.arch:
        for key, kernel in compiled(
            arch, [getattr(torch, name) for name in options.dtype], tuple(options.bits)
        ).items():
            print(f"sm_{arch}", key.split()[0], usage(kernel), f"shared {kernel.metadata.shared}")
