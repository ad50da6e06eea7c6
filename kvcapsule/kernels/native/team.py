"""The threads of PyTorch's own OpenMP team, for work of ours.

After an operation of PyTorch's its workers wait for the next one without sleeping, for milliseconds, each on a core. Threads of our own
would have to share these cores with them: of two cores the second would be free only once they have given up. So the work is handed to the
very team that waits, through the entry that compilers use (`GOMP_parallel`, of libgomp; LLVM's and Intel's libraries have it too on Linux).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _OpenMP(NamedTuple):
    parallel: Callable[..., None]
    number: Callable[[], int]
    """Of a thread in its team."""
    members: Callable[[], int]


@cache
def _openmp() -> _OpenMP | None:
    """None where PyTorch has no team, or one that has no such entry."""
    if not torch.backends.openmp.is_available():
        return None
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        place = Path(torch.__file__).parent / "lib" / name
        if place.is_file():
            # Names are looked for in what the library needs, too: the very OpenMP that PyTorch uses.
            library = ctypes.CDLL(str(place))
            try:
                entry, number, members = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
            except AttributeError:
                return None
            entry.argtypes, entry.restype = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
            return _OpenMP(entry, number, members)
    return None


def together(work: Callable[[int], None], many: int) -> bool:
    """work(0) to work(many - 1), each in a thread of the team; back when all are done. False, and nothing is done, without a team.

    Raises: what `work` raises, the first of it.
    """
    openmp = _openmp()
    if openmp is None:
        return False
    failed: list[BaseException] = []

    def member(_: int | None) -> None:
        # A team may be smaller than was asked for.
        try:
            for i in range(openmp.number(), many, openmp.members()):
                work(i)
        except BaseException as error:  # it must not be lost in the foreign code that called
            failed.append(error)

    openmp.parallel(_BODY(member), None, many, 0)
    if failed:
        raise failed[0]
    return True
