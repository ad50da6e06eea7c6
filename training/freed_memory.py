"""Memory that a stage freed, given back to the system before the next one begins."""

import ctypes
import gc
import sys


def give_back() -> None:
    """Free what only cycles of references hold, and `trim`."""
    gc.collect()
    trim()


def trim() -> None:
    """Let the C library return what it keeps of freed tensors: glibc holds it for later calls of the same sizes, and
    few of those that come next are of them. Elsewhere nothing is done."""
    if sys.platform.startswith("linux"):
        of_glibc = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if of_glibc is not None:
            of_glibc(0)
