"""A block of a matrix product whose sums are in registers: rows times a map.

A row has two numbers, a < A and b < B, for rows are the queries of two tiles: x[x0 + a xa + b xb + k xk] meets map[m0 + k mk : ... + 16 V].
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .emit import FLOAT, INT, NONE, WIDE, Array, Sums, along, ints, literal, pairs, splat, whole

_U = types.uint64


def _sums(context, builder, signature, arguments, rows):
    """The block's sums, row by row."""
    x, x0, xa, xb, xk, map_, m0, mk, length = arguments[:9]
    x, map_ = Array(context, builder, signature.args[0], x), Array(context, builder, signature.args[5], map_)
    A, B, V = rows
    total = Sums(builder, [NONE] * (A * B * V))
    with along(builder, whole(0), length) as loop:
        line = builder.add(m0, builder.mul(mk, loop.index))
        lanes = [map_.load(builder.add(line, whole(WIDE * v))) for v in range(V)]
        here = builder.add(x0, builder.mul(xk, loop.index))
        for a in range(A):
            for b in range(B):
                place = builder.add(here, builder.add(builder.mul(xa, whole(a)), builder.mul(xb, whole(b))))
                number = splat(builder, x.load(place, FLOAT))
                for v in range(V):
                    total.add((a * B + b) * V + v, lanes[v], number)
    return total


def _types(x, map_, out, *sizes):
    return types.void(x, _U, _U, _U, _U, map_, _U, _U, _U, out, _U, _U, _U, *sizes)


@intrinsic
def rows_by_map(typing_context, x, x0, xa, xb, xk, map_, m0, mk, K, out, o0, oa, ob, A, B, V, more):
    """out[o0 + a oa + b ob : ... + 16 V] = the sums, or += where `more` is 1."""
    if not literal(A, B, V, more):
        return None
    a_, b_, v_, add = (size.literal_value for size in (A, B, V, more))

    def generate(context, builder, signature, arguments):
        total = _sums(context, builder, signature, arguments, (a_, b_, v_))
        o0, oa, ob = arguments[10:13]
        out = Array(context, builder, signature.args[9], arguments[9])
        for a in range(a_):
            for b in range(b_):
                row = builder.add(o0, builder.add(builder.mul(oa, whole(a)), builder.mul(ob, whole(b))))
                for v in range(v_):
                    place, lanes = builder.add(row, whole(WIDE * v)), total[(a * b_ + b) * v_ + v]
                    out.store(place, builder.fadd(lanes, out.load(place)) if add else lanes)
        return context.get_dummy_value()

    return _types(x, map_, out, A, B, V, more), generate


@intrinsic
def pairs_by_map(typing_context, x, x0, xa, xb, xk, map_, m0, mk, K, out, o0, oa, oh, A, V):
    """The same with B = 2, the numbers of both tiles side by side: eight columns h of row a are out[o0 + a oa + h oh : ... + 16]."""
    if not literal(A, V):
        return None
    a_, v_ = A.literal_value, V.literal_value

    def generate(context, builder, signature, arguments):
        total = _sums(context, builder, signature, arguments, (a_, 2, v_))
        o0, oa, oh = arguments[10:13]
        out = Array(context, builder, signature.args[9], arguments[9])
        for a in range(a_):
            row = builder.add(o0, builder.mul(oa, whole(a)))
            for v in range(v_):
                halves = pairs(builder, total[2 * a * v_ + v], total[(2 * a + 1) * v_ + v])
                for i, lanes in enumerate(halves):
                    out.store(builder.add(row, builder.mul(oh, whole(2 * v + i))), lanes)
        return context.get_dummy_value()

    return _types(x, map_, out, A, V), generate


def _four(builder, lanes):
    """The sums of four vectors' lanes, as one vector of four: within quarters of the vectors first."""

    def picked(x, y, order):
        return builder.shuffle_vector(x, y, ints([4 * q + i % 4 + WIDE * (i // 4) for q in range(4) for i in order]))

    a, b, c, d = lanes
    first = builder.fadd(picked(a, b, (0, 4, 1, 5)), picked(a, b, (2, 6, 3, 7)))
    second = builder.fadd(picked(c, d, (0, 4, 1, 5)), picked(c, d, (2, 6, 3, 7)))
    quarters = builder.fadd(picked(first, second, (0, 1, 4, 5)), picked(first, second, (2, 3, 6, 7)))
    for width in (8, 4):
        low, high = (builder.shuffle_vector(quarters, quarters, ints(range(i, i + width))) for i in (0, width))
        quarters = builder.fadd(low, high)
    return quarters


@intrinsic
def rows_by_rows(typing_context, x, x0, xa, y, y0, yn, K, out, o0, oa, A, N):
    """out[o0 + a oa : ... + N] = x[x0 + a xa : ... + K] times N rows y[y0 + n yn : ... + K], N 4 or 1; K a multiple of 16."""
    if not literal(A, N):
        return None
    rows, many = A.literal_value, N.literal_value

    def generate(context, builder, signature, arguments):
        x, x0, xa, y, y0, yn, length, out, o0, oa, _, _ = arguments
        x, y, out = (Array(context, builder, signature.args[i], array) for i, array in ((0, x), (3, y), (7, out)))
        total = Sums(builder, [NONE] * (many * rows))
        with along(builder, whole(0), builder.udiv(length, whole(WIDE))) as loop:
            k = builder.mul(loop.index, whole(WIDE))
            lanes = [y.load(builder.add(builder.add(y0, k), builder.mul(yn, whole(n)))) for n in range(many)]
            for a in range(rows):
                row = x.load(builder.add(builder.add(x0, k), builder.mul(xa, whole(a))))
                for n in range(many):
                    total.add(many * a + n, row, lanes[n])
        for a in range(rows):
            four = _four(builder, [total[many * a + n % many] for n in range(4)])
            found = four if many == 4 else builder.extract_element(four, ir.Constant(INT, 0))
            out.store(builder.add(o0, builder.mul(oa, whole(a))), found)
        return context.get_dummy_value()

    return types.void(x, _U, _U, y, _U, _U, _U, out, _U, _U, A, N), generate
