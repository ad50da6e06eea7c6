"""Putting one folder in the place of another so that whoever looks, or a process that is killed, finds one of the two.

Linux exchanges two names in one step (`renameat2`). Where the system or the file system cannot, the folder that is
replaced is renamed twice, and a process that is killed in between leaves its place empty: `put_back` mends that.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

_WORKING_DIRECTORY = -100
"""Linux's AT_FDCWD: paths are as they stand."""
_EXCHANGE = 2
"""Linux's RENAME_EXCHANGE."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False, and nothing happens, where that cannot be done.

    Args:
        one, other: two folders of one file system.
    """
    rename = _renameat2()
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = rename(_WORKING_DIRECTORY, names[0], _WORKING_DIRECTORY, names[1], _EXCHANGE)
    return done == 0


@cache
def _renameat2() -> Any:
    """The C library's function; None where it has none: other systems than Linux, and old libraries."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    rename.restype = ctypes.c_int
    return rename
