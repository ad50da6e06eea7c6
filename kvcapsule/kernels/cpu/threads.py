"""Pieces of a call's work in the threads of PyTorch's own OpenMP team.

After an operation of PyTorch's its workers wait for the next one without sleeping, for milliseconds, each on a core.
Threads of our own would have to share these cores with them. So the work is handed to the very team that waits, through
the entry that compilers use (`GOMP_parallel`, of libgomp; LLVM's and Intel's libraries have it too on Linux). Where
there is no such team, threads of Python's do it.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_LEAST = 2**20
"""Multiply-adds that are worth another thread: handing work over takes some microseconds, and parts must be joined."""


class OpenMP(NamedTuple):
    """Entries of the OpenMP library that PyTorch uses, and addresses of two."""

    parallel: Callable[..., None]
    """(function, its argument, threads, flags): the function once in each thread of a team."""
    thread: int
    """int omp_get_thread_num(void)."""
    threads: int
    """int omp_get_num_threads(void)."""


@cache
def openmp() -> OpenMP | None:
    """None where PyTorch has no team, or one that has no such entry."""
    if not torch.backends.openmp.is_available():
        return None
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            # Names are looked for in what the library needs, too: the very OpenMP that PyTorch uses.
            library = ctypes.CDLL(str(path))
            try:
                parallel = library.GOMP_parallel
                numbers = address(library.omp_get_thread_num), address(library.omp_get_num_threads)
            except AttributeError:
                return None
            parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            parallel.restype = None
            return OpenMP(parallel, *numbers)
    return None


def address(function: Any) -> int:
    """Of a function of a library."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def count(work: int) -> int:
    """How many threads so many multiply-adds are worth."""
    return max(1, min(torch.get_num_threads(), work // _LEAST))


@lru_cache(maxsize=8)
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads of Python's, where there is no team."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kvcapsule")
