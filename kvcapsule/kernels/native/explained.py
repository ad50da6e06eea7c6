"""What kept tokens have to explain, and what each explains: products and Cholesky factorisations pair by pair, a tile and a head."""

import numpy as np

from .blocks import rows_by_rows
from .jit import U, jit
from .reading import times
from .wide import each, load, plus, scaled, store, total


@jit
def _products(x, x0, many, y, y0, rows, length, out, o0, step):
    """out[i, n] = x[i] y[n], rows of `length` numbers, for i < many."""
    n = U(0)
    while n + U(4) <= rows:
        i = U(0)
        while i + U(4) <= many:
            rows_by_rows(x, x0 + i * length, length, y, y0 + n * length, length, length, out, o0 + i * step + n, step, 4, 4)
            i += U(4)
        while i < many:
            rows_by_rows(x, x0 + i * length, length, y, y0 + n * length, length, length, out, o0 + i * step + n, step, 1, 4)
            i += U(1)
        n += U(4)
    while n < rows:
        for row in range(many):
            rows_by_rows(x, x0 + row * length, length, y, y0 + n * length, length, length, out, o0 + row * step + n, step, 1, 1)
        n += U(1)


@jit
def products(x, y, many, rows, length, out, begin, end):
    """Of every pair."""
    for pair in range(begin, end):
        _products(x, pair * many * length, many, y, pair * rows * length, rows, length, out, pair * many * rows, rows)


@jit
def _gram(x, x0, rows, length, out, o0):
    """The same of rows with themselves: what lies above the blocks of the diagonal, mirrored."""
    n = U(0)
    while n < rows:
        many = min(U(4), rows - n)
        _products(x, x0, n + many, x, x0 + n * length, many, length, out, o0 + n, rows)
        for i in range(n):
            for j in range(n, n + many):
                out[o0 + j * rows + i] = out[o0 + i * rows + j]
        n += U(4)


@jit
def _outputs(shared, s0, rows, tokens, v, v0, step, dim, mass, out, o0):
    """out [C, D + 1] = shared [C, T] times the values and, last, `mass` in units of their size."""
    wide, square = dim + U(1), each(np.float32(0))
    for t in range(tokens):
        n = U(0)
        while n < dim:
            here = load(v, v0 + t * step + n)
            square = plus(square, here, here)
            n += U(16)
    unit = mass * np.sqrt(total(square) / np.float32(tokens))
    times(shared, s0, tokens, rows, v, v0, step, tokens, dim, out, o0, wide)
    for i in range(rows):
        whole = np.float32(0)
        for t in range(tokens):
            whole += shared[s0 + i * tokens + t]
        out[o0 + i * wide + dim] = unit * whole


@jit
def targets(chosen, attention, all_compete, v, of_head, of_tile, of_token, tiles, sizes, mass, shared, target, begin, end):
    rows, tokens, dim, queries = sizes
    for pair in range(begin, end):
        at, s0 = pair * tokens * queries, pair * rows * tokens
        if all_compete:
            _gram(attention, at, tokens, queries, shared, s0)
        else:
            _products(chosen, pair * rows * queries, rows, attention, at, tokens, queries, shared, s0, tokens)
        first = pair // tiles * of_head + pair % tiles * of_tile
        _outputs(shared, s0, rows, tokens, v, first, of_token, dim, mass, target, pair * rows * (dim + U(1)))


@jit
def _ordered(ranking, r0, many, order):
    """order: where the greatest are, of equals the earlier one first."""
    for i in range(many):
        value, place = ranking[r0 + i], U(0) + i
        while place > U(0) and ranking[r0 + order[place - U(1)]] < value:
            order[place] = order[place - U(1)]
            place -= U(1)
        order[place] = i


@jit
def _laid_out(gram, g0, target, t0, many, wide, order, norm, jitter, out, begin, room):
    """out [C, room]: the upper triangle of the Gram matrix in that order, of rows of length 1, and from `begin` on their targets."""
    for i in range(many):
        row, from_, size = i * room, g0 + order[i] * many, norm[order[i]]
        for j in range(i // U(16) * U(16), i):
            out[row + j] = np.float32(0)
        for j in range(i, many):
            out[row + j] = gram[from_ + order[j]] * norm[order[j]] * size
        out[row + i] += jitter
        from_ = t0 + order[i] * wide
        for j in range(wide):
            out[row + begin + j] = target[from_ + j] * size


@jit
def _less(x, row, other, begin, end, factor):
    """Of a row, `factor` times another."""
    less = each(-factor)
    n = begin
    while n < end:
        store(x, row + n, plus(load(x, row + n), load(x, other + n), less))
        n += U(16)


@jit
def _less_four(x, row, other, room, begin, end, a, b, c, d):
    """Of a row, four others that follow one another."""
    a_, b_, c_, d_ = each(-a), each(-b), each(-c), each(-d)
    n = begin
    while n < end:
        here = plus(load(x, row + n), load(x, other + n), a_)
        here = plus(here, load(x, other + room + n), b_)
        here = plus(here, load(x, other + U(2) * room + n), c_)
        store(x, row + n, plus(here, load(x, other + U(3) * room + n), d_))
        n += U(16)


@jit
def _factored(x, many, room, least):
    """Cholesky: x [C, room], above whose diagonal the matrix is, becomes the root's rows and what is left of the targets beside them."""
    first = U(0)
    while first < many:
        last = min(first + U(4), many)
        for i in range(first, last):
            row, begin = i * room, i // U(16) * U(16)
            for j in range(first, i):
                _less(x, row, j * room, begin, room, x[j * room + i])
            factor = each(np.float32(1) / np.sqrt(max(x[row + i], least)))
            n = begin
            while n < room:
                store(x, row + n, scaled(load(x, row + n), factor))
                n += U(16)
        for i in range(last, many):
            at = first * room + i
            _less_four(
                x, i * room, first * room, room, i // U(16) * U(16), room,
                x[at], x[at + room], x[at + U(2) * room], x[at + U(3) * room],
            )  # fmt: skip
        first = last


@jit
def added(gram, target, ranking, sizes, jitter, tiny, out, begin, end):
    many, wide, passes = sizes
    first = (many + U(15)) // U(16) * U(16)
    room = first + (wide + U(15)) // U(16) * U(16)
    x, norm, order = np.zeros(many * room, np.float32), np.empty(many, np.float32), np.empty(many, np.uint64)
    for pair in range(begin, end):
        g0, t0, r0 = pair * many * many, pair * many * wide, pair * many
        for i in range(many):
            out[r0 + i] = ranking[r0 + i]
            norm[i] = np.float32(1) / np.sqrt(max(gram[g0 + i * many + i], tiny))
        for _ in range(passes):
            _ordered(out, r0, many, order)
            _laid_out(gram, g0, target, t0, many, wide, order, norm, jitter, x, first, room)
            _factored(x, many, room, jitter * jitter)
            for i in range(many):
                square = each(np.float32(0))
                n = i * room + first
                while n < (i + U(1)) * room:
                    square = plus(square, load(x, n), load(x, n))
                    n += U(16)
                out[r0 + order[i]] = total(square)
