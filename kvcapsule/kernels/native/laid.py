"""Cells of 1 to 4 bits of eight tiles laid out for the loops over cells: words of 32 bits, those of the eight tiles side by side.

A word of two tiles is then one number of 64 bits, which is sent to all lanes of a register as it is loaded: what the loops over cells wait
for is loads. Codes of three bits, which lie in two places of three bytes, become fields of four bits on the way; others stay as they are.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ...segments.bit_packing import WIDTHS
from . import emit
from .emit import BYTE, INT, INTS, WIDE, ints, literal, whole
from .forms import TILES, Array
from .jit import U, jit, lent

_U = types.uint64
_CHUNK = 16
"""Bytes of a tile that are read at once: four words, or twelve bytes of cells of three bits."""


def _spread(builder, words):
    """Words of three bytes, [eight fields of 2 bits | eight of 1 bit], as eight fields of 4 bits."""

    def number(n):
        return ir.Constant(INTS, [ir.Constant(INT, n)] * WIDE)

    def apart(bits, *steps):
        for by, kept in steps:
            bits = builder.and_(builder.or_(bits, builder.shl(bits, number(by))), number(kept))
        return bits

    low = apart(builder.and_(words, number(0xFFFF)), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333))
    high = builder.and_(builder.lshr(words, number(16)), number(0xFF))
    high = apart(high, (12, 0x000F000F), (6, 0x03030303), (3, 0x11111111))
    return builder.or_(low, builder.shl(high, number(2)))


@intrinsic
def _chunk(typing_context, packed, base, at, out, o0, three):
    """Four words of eight tiles from packed[base[tile] + at ...]: out [4, TILES] from o0 on. three: 1 where cells are of three bits."""
    if not literal(three):
        return None
    spread = three.literal_value

    def generate(context, builder, signature, arguments):
        packed, base, out = (emit.Array(context, builder, signature.args[i], arguments[i]) for i in (0, 1, 3))
        at, o0 = arguments[2], arguments[4]
        tiles = []
        for tile in range(TILES):
            found = packed.load(builder.add(base.load(whole(tile), ir.IntType(64)), at), ir.VectorType(BYTE, _CHUNK))
            if spread:
                order = [3 * (i // 4) + i % 4 if i % 4 < 3 else _CHUNK for i in range(_CHUNK)]
                found = builder.shuffle_vector(found, ir.Constant(found.type, [ir.Constant(BYTE, 0)] * _CHUNK), ints(order))
            tiles.append(builder.bitcast(found, ir.VectorType(INT, 4)))
        while len(tiles) > 2:
            size = 2 * tiles[0].type.count
            tiles = [builder.shuffle_vector(*tiles[i : i + 2], ints(range(size))) for i in range(0, len(tiles), 2)]
        for half in (0, 1):
            words = builder.shuffle_vector(*tiles, ints([4 * tile + 2 * half + word for word in (0, 1) for tile in range(TILES)]))
            out.store(builder.add(o0, whole(WIDE * half)), _spread(builder, words) if spread else words)
        return context.get_dummy_value()

    return types.void(packed, base, _U, out, _U, three), generate


class Rest(NamedTuple):
    """A copy of the bytes of a chunk that ends beyond those of the last entry of all, and where it has each tile's."""

    packed: Array
    base: Array


@jit
def at_the_end():
    base = np.empty(TILES, np.uint64)
    for tile in range(U(TILES)):
        base[tile] = tile * U(_CHUNK)
    return Rest(np.zeros(TILES * _CHUNK, np.uint8), base)


@lent
def lay(packed, base, stretches, set_, out, rest):
    """The cells of a set of eight tiles, whose bytes begin at base[:]."""
    end, last = U(len(packed)), U(0)
    for tile in range(U(TILES)):
        last = max(last, base[tile])
    for i in range(U(1), U(len(WIDTHS))):
        line = (set_ * U(len(WIDTHS)) + i) * U(3)
        at, stop, o = U(stretches[line]), U(stretches[line + U(1)]), U(stretches[line + U(2)]) * U(TILES)
        three = i == U(2)
        while at < stop:
            if last + at + U(_CHUNK) <= end:
                if three:
                    _chunk(packed, base, at, out, o, 1)
                else:
                    _chunk(packed, base, at, out, o, 0)
            else:
                for tile in range(U(TILES)):
                    for k in range(min(U(_CHUNK), end - min(end, base[tile] + at))):
                        rest.packed[tile * U(_CHUNK) + k] = packed[base[tile] + at + k]
                if three:
                    _chunk(rest.packed, rest.base, U(0), out, o, 1)
                else:
                    _chunk(rest.packed, rest.base, U(0), out, o, 0)
            at += U(12) if three else U(16)
            o += U(4 * TILES)
