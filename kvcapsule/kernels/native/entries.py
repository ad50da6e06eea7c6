"""The entries of a segment in the order in which a kernel reads them, and the tiles that they are read in."""

import numpy as np

from .jit import U, jit, lent


@lent
def part(entries, order, counter, rows, mapped):
    """Entry, first row and number of rows of a tile."""
    if mapped:
        return order[counter], U(0), rows
    parts = (entries.tokens + rows - U(1)) // rows
    first = counter % parts * rows
    return order[counter // parts], first, min(rows, entries.tokens - first)


@jit
def sorted_entries(entries, batch):
    """Entries with a token in the order of their batch rows."""
    count = U(len(entries.owner))
    found, some = np.empty(count, np.uint64), U(0)
    first = np.zeros(batch + U(1), np.uint64)
    there = np.ones(count, np.bool_)
    for e in range(count):
        if entries.masked:
            there[e] = entries.mask[e * entries.tokens : (e + U(1)) * entries.tokens].any()
        if there[e]:
            first[U(entries.owner[e]) + U(1)] += U(1)
            some += U(1)
    for b in range(batch):
        first[b + U(1)] += first[b]
    for e in range(count):
        if there[e]:
            row = U(entries.owner[e])
            found[first[row]] = e
            first[row] += U(1)
    return found[:some]
