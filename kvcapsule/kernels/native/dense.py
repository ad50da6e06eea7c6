"""Two products of a few rows with many, on flat fp32 arrays: rows of `x` along K (`dots`) or K rows of `x` (`sums`).

Each is four or eight fused multiply-adds for every number that is loaded, so that few query rows already use the memory's bandwidth.
Each argument beside a name is where it begins, and how far its rows are apart. Everything is unsigned (see jit.py).
"""

import numpy as np

from .jit import U, jit


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
    k = U(0)
    while k + U(4) <= K:
        b0 = x0 + k * xs
        b1 = b0 + xs
        b2 = b1 + xs
        b3 = b2 + xs
        r = U(0)
        while r < R:
            a, o = w0 + r * ws + k, o0 + r * os
            p0, p1, p2, p3 = w[a], w[a + U(1)], w[a + U(2)], w[a + U(3)]
            if r + U(1) < R:
                c, u = a + ws, o + os
                q0, q1, q2, q3 = w[c], w[c + U(1)], w[c + U(2)], w[c + U(3)]
                for n in range(N):
                    x_0, x_1, x_2, x_3 = x[b0 + n], x[b1 + n], x[b2 + n], x[b3 + n]
                    out[o + n] += p0 * x_0 + p1 * x_1 + p2 * x_2 + p3 * x_3
                    out[u + n] += q0 * x_0 + q1 * x_1 + q2 * x_2 + q3 * x_3
            else:
                for n in range(N):
                    out[o + n] += p0 * x[b0 + n] + p1 * x[b1 + n] + p2 * x[b2 + n] + p3 * x[b3 + n]
            r += U(2)
        k += U(4)
    while k < K:
        b = x0 + k * xs
        for row in range(R):
            p, o = w[w0 + row * ws + k], o0 + row * os
            for n in range(N):
                out[o + n] += p * x[b + n]
        k += U(1)
