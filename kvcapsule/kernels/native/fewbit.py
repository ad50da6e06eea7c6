"""Products with few-bit rows (kvcapsule.segments.quantized_rows): a block of codes becomes numbers in a core's first cache, and is used there.

Flat arrays; a unit is one KV head of one entry, with codes [D, bytes] along the tokens and a step for each channel. Numbers are
step * (code - middle), with the middle of all codes; what the middle stands for is added by the caller.
"""

from typing import NamedTuple

import numpy as np

from ...segments.bit_packing import WIDTHS
from .dense import dots
from .dense import sums as weighted
from .jit import Kernel, U, jit
from .lanes import store, unpack

_TOKENS = U(64)
"""Of a block of keys, which has all channels."""
_CHANNELS, _RUN = U(16), U(512)
"""Channels and tokens of a block of values."""


class FewBits(NamedTuple):
    """The kernels for codes of one width; line: bytes of a channel."""

    products: Kernel
    """out [U, R, M] += q [U, R, D] times the numbers of the tokens since .. until; since is a multiple of 8."""
    sums: Kernel
    """out [U, R, D] += w [U, R, M] times the numbers of the tokens since .. until."""


def _of(bits: int) -> FewBits:
    each = U(bits)

    @jit
    def read(codes, base, m, n, step, x, x0):
        """Of one channel, the tokens m .. m + n, and what fills up their last eight."""
        at = base + (m // U(8)) * each
        for group in range((n + U(7)) // U(8)):
            store(x, x0 + group * U(8), unpack(codes, at, bits, step))
            at += each

    @jit
    def products(q, rows, codes, line, step, D, M, out, begin, end, since, until):
        x = np.empty(D * _TOKENS, np.float32)
        for unit in range(begin, end):
            m = since
            while m < until:
                n = min(_TOKENS, until - m)
                for d in range(D):
                    read(codes, (unit * D + d) * line, m, n, step[unit * D + d], x, d * _TOKENS)
                weighted(q, unit * rows * D, D, rows, x, U(0), _TOKENS, D, n, out, unit * rows * M + m, M)
                m += n

    @jit
    def sums(w, rows, codes, line, step, D, M, out, begin, end, since, until):
        x = np.empty(_CHANNELS * _RUN, np.float32)
        for unit in range(begin, end):
            m = since
            while m < until:
                n = min(_RUN, until - m)
                d = U(0)
                while d < D:
                    many = min(_CHANNELS, D - d)
                    for i in range(many):
                        read(codes, (unit * D + d + i) * line, m, n, step[unit * D + d + i], x, i * _RUN)
                    dots(w, unit * rows * M + m, M, rows, x, U(0), _RUN, n, many, out, unit * rows * D + d, D)
                    d += many
                m += n

    return FewBits(products, sums)


KERNELS = {bits: _of(bits) for bits in WIDTHS}
