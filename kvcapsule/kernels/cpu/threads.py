"""Threads of PyTorch's own OpenMP team for pieces of a call's work.

After an operation of PyTorch's its workers wait for the next one without sleeping, for milliseconds, each on a core.
Threads of our own would have to share these cores with them. So the work is handed to the very team that waits, through
the entry that compilers use (`GOMP_parallel`, of libgomp; LLVM's and Intel's libraries have it too on Linux). Where
there is no such team, threads of Python's do it.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

_LEAST = 2**20
"""Multiply-adds that are worth another thread: handing work over takes some microseconds, and parts must be joined."""
_ENTRIES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@cache
def openmp() -> ctypes.CDLL | None:
    """A library through which the OpenMP library that PyTorch uses is found: GOMP_parallel(function, its argument,
    threads, 0), omp_get_thread_num() and omp_get_num_threads(). None where PyTorch has no team, or one without these.
    """
    folder = Path(torch.__file__).parent / "lib"
    paths = [path for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (path := folder / name).is_file()]
    if not torch.backends.openmp.is_available() or not paths:
        return None
    # Names are looked for in what the library needs, too.
    library = ctypes.CDLL(str(paths[0]))
    if not all(hasattr(library, name) for name in _ENTRIES):
        return None
    library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library


def address(function: Any) -> int | None:
    """Of a function of a library."""
    return ctypes.cast(function, ctypes.c_void_p).value


def count(work: int) -> int:
    """How many threads so many multiply-adds are worth."""
    return max(1, min(torch.get_num_threads(), work // _LEAST))


@lru_cache(maxsize=8)
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads of Python's, where there is no team."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kvcapsule")
