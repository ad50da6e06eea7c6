"""A block of a matrix product whose sums are in registers: rows times a map.

A row has two numbers, a < A and b < B, for rows are the queries of two tiles: x[x0 + a xa + b xb + k xk] meets map[m0 + k mk : ... + 16 V].
"""

from numba.core import types
from numba.extending import intrinsic

from .emit import FLOAT, NONE, WIDE, Array, Sums, along, literal, pairs, splat, whole

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

