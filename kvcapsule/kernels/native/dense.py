"""Two products of a few rows with many, on flat fp32 arrays: rows of `x` along K (`dots`) or K rows of `x` (`sums`).

Each holds its sums in registers, so that few query rows already use the memory's bandwidth.
Each argument beside a name is where it begins, and how far its rows are apart. Everything is unsigned (see jit.py).
"""

import numpy as np

from .jit import U, jit
from .lanes import load, plus, store, zeros


@jit
def dots(w, w0, ws, R, x, x0, xs, K, N, out, o0, os):
    """out[r, n] += sum over k of w[r, k] x[n, k]."""
    n = U(0)
    while n < N:
        both = n + U(1) < N
        b0 = x0 + n * xs
        b1 = b0 + xs if both else b0
        r = U(0)
        while r < R:
            # Where there are no four rows, the first stands for those that are missing.
            a0 = w0 + r * ws
            a1 = a0 + ws if r + U(1) < R else a0
            a2 = a0 + U(2) * ws if r + U(2) < R else a0
            a3 = a0 + U(3) * ws if r + U(3) < R else a0
            s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = np.float32(0)
            for k in range(K):
                x_0, x_1 = x[b0 + k], x[b1 + k]
                w_0, w_1, w_2, w_3 = w[a0 + k], w[a1 + k], w[a2 + k], w[a3 + k]
                s00 += w_0 * x_0
                s01 += w_0 * x_1
                s10 += w_1 * x_0
                s11 += w_1 * x_1
                s20 += w_2 * x_0
                s21 += w_2 * x_1
                s30 += w_3 * x_0
                s31 += w_3 * x_1
            o = o0 + r * os + n
            _two(out, o, both, s00, s01)
            if r + U(1) < R:
                _two(out, o + os, both, s10, s11)
            if r + U(2) < R:
                _two(out, o + U(2) * os, both, s20, s21)
            if r + U(3) < R:
                _two(out, o + U(3) * os, both, s30, s31)
            r += U(4)
        n += U(2)


@jit
def _two(out, o, both, first, second):
    out[o] += first
    if both:
        out[o + U(1)] += second


@jit
def sums(w, w0, ws, R, x, x0, xs, K, N, out, o0, os):
    """out[r, n] += sum over k of w[r, k] x[k, n]."""
    n = U(0)
    while n + U(32) <= N:
        r = U(0)
        while r < R:
            _four_by_32(w, w0 + r * ws, ws, R - r, x, x0 + n, xs, K, out, o0 + r * os + n, os)
            r += U(4)
        n += U(32)
    while n + U(8) <= N:
        r = U(0)
        while r < R:
            _four_by_8(w, w0 + r * ws, ws, R - r, x, x0 + n, xs, K, out, o0 + r * os + n, os)
            r += U(4)
        n += U(8)
    while n < N:
        for row in range(R):
            a, b, total = w0 + row * ws, x0 + n, np.float32(0)
            for _ in range(K):
                total += w[a] * x[b]
                a += U(1)
                b += xs
            out[o0 + row * os + n] += total
        n += U(1)


@jit
def _four_by_32(w, w0, ws, R, x, b, xs, K, out, o, os):
    """Of at most four rows, 32 sums each; where there are no four, the last stands for those that are missing."""
    i1, i2, i3 = min(U(1), R - U(1)), min(U(2), R - U(1)), min(U(3), R - U(1))
    a0, a1, a2, a3 = w0, w0 + i1 * ws, w0 + i2 * ws, w0 + i3 * ws
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zeros()
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zeros()
    for k in range(K):
        x_0, x_1, x_2, x_3 = load(x, b), load(x, b + U(8)), load(x, b + U(16)), load(x, b + U(24))
        p = w[a0 + k]
        s00, s01, s02, s03 = plus(s00, x_0, p), plus(s01, x_1, p), plus(s02, x_2, p), plus(s03, x_3, p)
        p = w[a1 + k]
        s10, s11, s12, s13 = plus(s10, x_0, p), plus(s11, x_1, p), plus(s12, x_2, p), plus(s13, x_3, p)
        p = w[a2 + k]
        s20, s21, s22, s23 = plus(s20, x_0, p), plus(s21, x_1, p), plus(s22, x_2, p), plus(s23, x_3, p)
        p = w[a3 + k]
        s30, s31, s32, s33 = plus(s30, x_0, p), plus(s31, x_1, p), plus(s32, x_2, p), plus(s33, x_3, p)
        b += xs
    _add_32(out, o, s00, s01, s02, s03)
    if U(1) < R:
        _add_32(out, o + os, s10, s11, s12, s13)
    if U(2) < R:
        _add_32(out, o + U(2) * os, s20, s21, s22, s23)
    if U(3) < R:
        _add_32(out, o + U(3) * os, s30, s31, s32, s33)


@jit
def _four_by_8(w, w0, ws, R, x, b, xs, K, out, o, os):
    i1, i2, i3 = min(U(1), R - U(1)), min(U(2), R - U(1)), min(U(3), R - U(1))
    a0, a1, a2, a3 = w0, w0 + i1 * ws, w0 + i2 * ws, w0 + i3 * ws
    s_0 = s_1 = s_2 = s_3 = zeros()
    for k in range(K):
        lanes = load(x, b)
        s_0, s_1 = plus(s_0, lanes, w[a0 + k]), plus(s_1, lanes, w[a1 + k])
        s_2, s_3 = plus(s_2, lanes, w[a2 + k]), plus(s_3, lanes, w[a3 + k])
        b += xs
    add(out, o, s_0)
    if U(1) < R:
        add(out, o + os, s_1)
    if U(2) < R:
        add(out, o + U(2) * os, s_2)
    if U(3) < R:
        add(out, o + U(3) * os, s_3)


@jit
def _add_32(out, o, first, second, third, fourth):
    add(out, o, first)
    add(out, o + U(8), second)
    add(out, o + U(16), third)
    add(out, o + U(24), fourth)


@jit
def add(out, at, lanes):
    """out[at : at + 8] += lanes."""
    store(out, at, plus(load(out, at), lanes, np.float32(1)))
