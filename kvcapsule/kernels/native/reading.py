"""How a bank of queries reads tiles: the scores of a tile and a head, a pair, and their softmax while they are still in the cache."""

import numpy as np

from .blocks import rows_by_map
from .jit import U, jit
from .wide import each, exp, greatest, load, plus, scaled, store, total


@jit
def times(x, x0, step, rows, map_, m0, apart, length, width, out, o0, beyond):
    """out [rows, width] = x [rows, length] map [length, width], a multiple of 16; rows are `step`, `apart` and `beyond` from each other."""
    n = U(0)
    while n + U(32) <= width:
        i = U(0)
        while i + U(8) <= rows:
            rows_by_map(x, x0 + i * step, step, U(0), U(1), map_, m0 + n, apart, length, out, o0 + i * beyond + n, beyond, U(0), 8, 1, 2, 0)
            i += U(8)
        while i < rows:
            rows_by_map(x, x0 + i * step, step, U(0), U(1), map_, m0 + n, apart, length, out, o0 + i * beyond + n, beyond, U(0), 1, 1, 2, 0)
            i += U(1)
        n += U(32)
    if n < width:
        for row in range(rows):
            to = o0 + row * beyond + n
            rows_by_map(x, x0 + row * step, step, U(0), U(1), map_, m0 + n, apart, length, out, to, beyond, U(0), 1, 1, 1, 0)


@jit
def _powers(scores, s0, tokens, queries, out, top, sums, q0):
    """exp(score - the query's greatest) and, for each query, that greatest score and the sum over the tokens."""
    one, less = each(np.float32(1)), each(np.float32(-1))
    n = U(0)
    while n < queries:
        high = load(scores, s0 + n)
        for t in range(U(1), tokens):
            high = greatest(load(scores, s0 + t * queries + n), high)
        store(top, q0 + n, high)
        low, whole = scaled(high, less), each(np.float32(0))
        for t in range(tokens):
            power = exp(plus(low, load(scores, s0 + t * queries + n), one))
            store(out, s0 + t * queries + n, power)
            whole = plus(whole, power, one)
        store(sums, q0 + n, whole)
        n += U(16)


@jit
def _shares(attention, a0, tokens, queries, factors, energy, mass, t0):
    """Powers times the queries' factors, and the mean square and the mean of what each token gets."""
    one = each(np.float32(1))
    for t in range(tokens):
        row, square, whole = a0 + t * queries, each(np.float32(0)), each(np.float32(0))
        n = U(0)
        while n < queries:
            share = scaled(load(attention, row + n), load(factors, n))
            store(attention, row + n, share)
            square, whole = plus(square, share, share), plus(whole, share, one)
            n += U(16)
        energy[t0 + t] = total(square) / np.float32(queries)
        mass[t0 + t] = total(whole) / np.float32(queries)


@jit
def read(k, of_head, of_tile, of_token, tiles, q, sizes, scores, attention, top, sums, energy, mass, begin, end):
    tokens, dim, queries = sizes
    factors = np.empty(queries, np.float32)
    for pair in range(begin, end):
        head, tile = pair // tiles, pair % tiles
        at = pair * tokens * queries
        k0, q0 = head * of_head + tile * of_tile, head * dim * queries
        times(k, k0, of_token, tokens, q, q0, queries, dim, queries, scores, at, queries)
        _powers(scores, at, tokens, queries, attention, top, sums, pair * queries)
        for n in range(queries):
            factors[n] = np.float32(1) / sums[pair * queries + n]
        _shares(attention, at, tokens, queries, factors, energy, mass, pair * tokens)
