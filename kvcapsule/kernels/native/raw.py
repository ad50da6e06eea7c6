"""Products with raw rows. Flat arrays; a unit is one KV head of one entry, whose rows are [M, D], dense along D."""

from .dense import dots
from .dense import sums as weighted
from .jit import U, jit

_BLOCK = U(256)
"""Rows that are in a core's second cache while all queries' weights pass over them."""


@jit
def products(q, rows, keys, entry, head, row, heads, D, M, out, begin, end, since, until):
    """out [U, R, M] += q [U, R, D] times the keys' rows since .. until; entry, head and row: how far these are apart."""
    for unit in range(begin, end):
        x0 = (unit // heads) * entry + (unit % heads) * head + since * row
        dots(q, unit * rows * D, D, rows, keys, x0, row, D, until - since, out, unit * rows * M + since, M)


@jit
def sums(w, rows, values, entry, head, row, heads, D, M, out, begin, end, since, until):
    """out [U, R, D] += w [U, R, M] times the values' rows since .. until."""
    for unit in range(begin, end):
        x0 = (unit // heads) * entry + (unit % heads) * head
        m = since
        while m < until:
            n = min(_BLOCK, until - m)
            weighted(w, unit * rows * M + m, M, rows, values, x0 + m * row, row, n, D, out, unit * rows * D, D)
            m += n
