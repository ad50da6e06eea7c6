"""How the kernels are compiled, and the one rule that keeps them quick.

Positions in flat arrays are unsigned: Numba takes a signed one for an index that may count from the end, looks at its sign at every
access, and then no loop becomes vector instructions. An unsigned number beside a signed one would be a float, so constants are `U(1)`.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import numba
import numpy as np

U = np.uint64
"""A position or a length."""
Kernel = Callable[..., Any]
"""What has been compiled."""

# Sums may be taken in any order; what is not a number stays so.
jit = partial(numba.njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
# Who holds an array is not counted: an atomic addition each time that one is taken from a tuple or handed on, a sixth of a call. Such a
# function makes no arrays of its own.
lent = partial(jit, _nrt=False)


def special(function: Callable[..., Any], suffix: str, **names: Any) -> Kernel:
    """A function compiled with constants and functions of its own under some global names; it makes no arrays.

    As a closure it would be compiled anew in every process: what a closure holds is part of Numba's key, and a compiled function in it has
    another identity in each.
    """
    compiled: Kernel = lent(_named(function, suffix, names))
    return compiled


def special_maker(function: Callable[..., Any], suffix: str, **names: Any) -> Kernel:
    """The same for one that makes arrays."""
    compiled: Kernel = jit(_named(function, suffix, names))
    return compiled


def _named(function: Callable[..., Any], suffix: str, names: dict[str, Any]) -> FunctionType:
    made = FunctionType(function.__code__, {**function.__globals__, **names}, f"{function.__name__}_{suffix}", function.__defaults__)
    # Machine code is kept under this name.
    made.__qualname__, made.__module__ = made.__name__, function.__module__
    return made
