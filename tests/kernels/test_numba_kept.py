"""Arguments of compiled kernels that are kept in memory."""

import numpy as np

from kvcapsule.kernels.native.forms import Map
from kvcapsule.kernels.native.jit import U, jit
from kvcapsule.kernels.native.kept import keep, taken


def test_what_is_taken_is_what_was_put() -> None:
    """Arrays are the very ones: what is written to them later is read.

    All types are the package's: what is compiled for a test's own would be kept with the package, where no command could load it.
    """
    own = Map(np.ones(4, np.float32), U(5), U(6), U(2**40))
    kept = keep((np.arange(3, dtype=np.uint8), True, own))
    kind = kept.type

    @jit
    def read(room):  # type: ignore[no-untyped-def]
        numbers, flag, found = taken(room, kind)
        return numbers.sum(), flag, found.numbers.sum(), found.row

    own.numbers[1] = 7
    for _ in range(3):
        assert read(kept.room) == (3, True, 10.0, 2**40)
