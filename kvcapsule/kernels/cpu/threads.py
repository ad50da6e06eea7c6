"""Pieces of a call's work in the threads of PyTorch's own OpenMP team.

After an operation of PyTorch's its workers wait for the next one without sleeping, for milliseconds, each on a core. Threads of our own
would have to share these cores with them. So the work is handed to the very team that waits, through the entry that compilers use
(`GOMP_parallel`, of libgomp; LLVM's and Intel's libraries have it too on Linux). Where there is no such team, threads of Python's do it.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

_LEAST = 2**20
"""Multiply-adds that are worth another thread: handing work over takes some microseconds, and each piece has to be joined."""


class OpenMP(NamedTuple):
    """Entries of the OpenMP library that PyTorch uses."""

    parallel: Callable[..., None]
    """(function, its argument, threads, flags): the function once in each thread of a team."""
    thread: int
    """Address of `int omp_get_thread_num(void)`."""
    threads: int
    """Address of `int omp_get_num_threads(void)`."""


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
                parallel, *numbers = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
            except AttributeError:
                return None
            parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
            thread, threads = (ctypes.cast(number, ctypes.c_void_p).value or 0 for number in numbers)
            return OpenMP(parallel, thread, threads)
    return None


def count(work: int) -> int:
    """How many threads so many multiply-adds are worth."""
    return max(1, min(torch.get_num_threads(), work // _LEAST))


def run(pieces: int, piece: Callable[[int], None], member: int, argument: int) -> None:
    """Do all pieces of a call; back when all are done.

    Args:
        pieces: how many.
        piece: does one of them; must let go of the interpreter's lock.
        member: address of `void member(void *argument)`, which does those of one thread of a team.
        argument: address of the call.
    """
    if pieces == 1:
        piece(0)
    elif (team := openmp()) is not None:
        team.parallel(member, argument, pieces, 0)
    else:
        list(_pool(pieces).map(piece, range(pieces)))


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kvcapsule")
