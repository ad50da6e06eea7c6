"""A kernel's work shared out among the threads that PyTorch is given.

PyTorch's own workers where they can be had (team.py), else plain Python threads, for the kernels let go of the interpreter's lock: not all
of Numba's own pools may be entered by two threads at once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from .team import together

_LEAST = 2**20
"""Multiply-adds that are worth another thread: handing work over takes some 50 microseconds."""


_Work = TypeVar("_Work")


class Piece(NamedTuple):
    """Units begin to end, of each of them the tokens since to until; pieces of one part have no unit in common."""

    begin: int
    end: int
    since: int
    until: int
    part: int


def pieces(units: int, tokens: int, work: int, block: int = 64) -> list[Piece]:
    """Pieces of about equal size.

    Args:
        units: entries times heads.
        tokens: of each unit.
        work: multiply-adds in all.
        block: tokens that stay together.
    """
    many = threads(work)
    if units >= many:
        cuts = _cuts(units, min(many, units), 1)
        return [Piece(begin, end, 0, tokens, 0) for begin, end in cuts]
    return [Piece(0, units, since, until, part) for part, (since, until) in enumerate(_cuts(tokens, many, block))]


def _cuts(length: int, number: int, block: int) -> list[tuple[int, int]]:
    step = -(-length // (number * block)) * block
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def threads(work: int) -> int:
    """How many threads that many multiply-adds are worth."""
    return max(1, min(torch.get_num_threads(), work // _LEAST))


def run(kernel: Callable[[_Work], None], work: Sequence[_Work]) -> None:
    """The kernel on every piece; back when all are done."""
    if len(work) == 1:
        kernel(work[0])
    elif not together(lambda i: kernel(work[i]), len(work)):
        list(_pool(len(work)).map(kernel, work))


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kvcapsule")
