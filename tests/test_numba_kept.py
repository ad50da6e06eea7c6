"""Arguments of compiled kernels that are kept in memory."""

from typing import NamedTuple

import numpy as np

from kvcapsule.kernels.native.forms import Map
from kvcapsule.kernels.native.jit import U, jit
from kvcapsule.kernels.native.kept import keep, taken


class _Both(NamedTuple):
    numbers: np.ndarray
    flag: bool
    map: Map


def test_what_is_taken_is_what_was_put() -> None:
    """Arrays are the very ones: what is written to them later is read."""
    both = _Both(np.arange(3, dtype=np.uint8), True, Map(np.ones(4, np.float32), U(5), U(6), U(2**40)))
    kept = keep((both,))
    kind = kept.type

    @jit
    def read(room):  # type: ignore[no-untyped-def]
        (found,) = taken(room, kind)
        return found.numbers.sum(), found.flag, found.map.numbers.sum(), found.map.row

    both.map.numbers[1] = 7
    for _ in range(3):
        assert read(kept.room) == (3, True, 10.0, 2**40)
