"""Arguments of a kernel kept in memory as compiled code takes them: handing fifty arrays over takes as long as a small segment."""

from functools import cache
from typing import Any, NamedTuple
from zlib import crc32

import numba
import numpy as np
from numba._dispatcher import compute_fingerprint
from numba.core import types
from numba.core.types.containers import BaseTuple
from numba.extending import intrinsic

from .emit import Array, whole
from .jit import Kernel, lent, special_maker

KEPT, call = types.none, lent
"""The type of what is kept, and a kernel of tiles.py; `_from_memory` puts others in their place."""


class Kept(NamedTuple):
    """Whoever holds it holds what the arguments' arrays are of, too."""

    room: np.ndarray
    type: Any
    """Numba's, of the arguments."""
    kernels: dict[Kernel, Kernel]
    """Those that have been asked for, by the ones that they are made from: to look a type up takes longer than a small segment."""

    def by(self, kernel: Kernel) -> Kernel:
        """A kernel of tiles.py for arguments that are kept."""
        found = self.kernels.get(kernel)
        if found is None:
            found = self.kernels[kernel] = _from_memory(kernel, self.type)
        return found


def _borrowed(context: Any, builder: Any, type_: Any, value: Any) -> Any:
    """The value without word of who owns its arrays: nobody counts them here."""
    if isinstance(type_, types.Array):
        array = context.make_array(type_)(context, builder, value)
        array.meminfo, array.parent = (getattr(array, name).type(None) for name in ("meminfo", "parent"))
        return array._getvalue()
    if isinstance(type_, BaseTuple):
        for i, inner in enumerate(type_.types):
            value = builder.insert_value(value, _borrowed(context, builder, inner, builder.extract_value(value, i)), i)
    return value


@intrinsic
def _put(typing_context, room, value):
    def generate(context, builder, signature, arguments):
        found = _borrowed(context, builder, signature.args[1], arguments[1])
        builder.store(found, Array(context, builder, signature.args[0], arguments[0]).place(whole(0), found.type), align=8)
        return context.get_dummy_value()

    return types.void(room, value), generate


@intrinsic
def _size(typing_context, value):
    def generate(context, builder, signature, arguments):
        return context.get_constant(types.uint64, context.get_abi_sizeof(arguments[0].type))

    return types.uint64(value), generate


@intrinsic
def taken(typing_context, room, type_):
    """What was put into `room`."""

    def generate(context, builder, signature, arguments):
        kept = context.get_value_type(signature.return_type)
        return builder.load(Array(context, builder, signature.args[0], arguments[0]).place(whole(0), kept), align=8)

    return type_.instance_type(room, type_), generate


@lent
def _length(value):
    return _size(value)


@lent
def _keep(room, value):
    _put(room, value)


_types: dict[bytes, tuple[Any, int, dict[Kernel, Kernel]]] = {}
"""Of all arguments that Numba takes for alike: their type, how many bytes they are, and the kernels for them."""


def keep(arguments: tuple[Any, ...]) -> Kept:
    mark = compute_fingerprint(arguments)
    if mark not in _types:
        _types[mark] = numba.typeof(arguments), int(_length(arguments)), {}
    type_, length, kernels = _types[mark]
    room = np.empty(-(-length // 8), np.uint64)
    _keep(room, arguments)
    return Kept(room, type_, kernels)


def attend(form, room, query, scale, found, piece, pieces):
    """As tiles.attend, with what is kept in place of what a kernel is given of a segment."""
    entries, turn, score_map, value_map, keys, values, after = taken(room, KEPT)
    call(form, entries, query, scale, turn, score_map, value_map, keys, values, after, found, piece, pieces)


@cache
def _from_memory(kernel: Kernel, type_: Any) -> Kernel:
    """What they are is part of its name, by which machine code is found again."""
    suffix = f"kept_{kernel.__name__}_{crc32(str(type_).encode()):08x}"
    return special_maker(attend, suffix, KEPT=type_, call=kernel)
