"""Sums of several parts, each beside its own greatest scores, as one."""

import numpy as np

from .jit import U, lent

_NONE = np.float32(-np.inf)


@lent
def join(found, place, rows, dim, out, apart, top, mass):
    """Adds the sums of some rows, out [rows, apart], to what has been found from row `place` on."""
    for row in range(rows):
        high, mine = found.top[place + row], top[row]
        if mine == _NONE:
            continue
        both = max(high, mine)
        # The first of all parts has nothing before it.
        before, now = np.exp(high - both) if high != _NONE else np.float32(0), np.exp(mine - both)
        found.top[place + row] = both
        found.mass[place + row] = found.mass[place + row] * before + mass[row] * now
        o, x = (place + row) * dim, row * U(apart)
        if high != _NONE:
            for d in range(dim):
                found.out[o + d] = found.out[o + d] * before + out[x + d] * now
        else:
            for d in range(dim):
                found.out[o + d] = out[x + d] * now


@lent
def finish(parts, rows, dim):
    """The first of some parts, [rows, D], after all others have been added to it, divided by its mass; 0 where nothing was found."""
    for i in range(1, len(parts)):
        join(parts[0], U(0), rows, dim, parts[i].out, dim, parts[i].top, parts[i].mass)
    for row in range(rows):
        there, mass = parts[0].top[row] != _NONE, max(parts[0].mass[row], np.finfo(np.float32).tiny)
        for d in range(dim):
            parts[0].out[row * dim + d] = parts[0].out[row * dim + d] / mass if there else np.float32(0)
