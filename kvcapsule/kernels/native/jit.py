"""How the kernels are compiled, and the one rule that keeps them quick.

Positions in flat arrays are unsigned: Numba takes a signed one for an index that may count from the end, looks at its sign at every
access, and then no loop becomes vector instructions. An unsigned number beside a signed one would be a float, so constants are `U(1)`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np

U = np.uint64
"""A position or a length."""
Kernel = Callable[..., Any]
"""What has been compiled."""

# Sums may be taken in any order; what is not a number stays so.
jit = partial(numba.njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
