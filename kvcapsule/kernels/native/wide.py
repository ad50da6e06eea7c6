"""Sixteen fp32 numbers as a type of Numba's, and what a softmax needs of them."""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from .emit import BYTE, FLOATS, INT, INTS, Array, constant, fma, ints, splat

_U = types.uint64


class Wide(types.Type):
    """The type of a vector."""

    def __init__(self) -> None:
        super().__init__("Wide")


@register_model(Wide)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, FLOATS)


_WIDE = Wide()


@intrinsic
def each(typing_context, number):
    """A number in all lanes."""
    return _WIDE(types.float32), lambda context, builder, signature, arguments: splat(builder, arguments[0])


@intrinsic
def load(typing_context, array, at):
    """array[at : at + 16]."""
    return _WIDE(array, _U), lambda context, builder, signature, arguments: Array(context, builder, array, arguments[0]).load(arguments[1])


@intrinsic
def store(typing_context, array, at, lanes):
    """array[at : at + 16] = lanes."""

    def generate(context, builder, signature, arguments):
        Array(context, builder, array, arguments[0]).store(*arguments[1:])
        return context.get_dummy_value()

    return types.void(array, _U, _WIDE), generate


@intrinsic
def plus(typing_context, z, x, y):
    """z + x y."""

    def generate(context, builder, signature, arguments):
        z, x, y = arguments
        return fma(builder, x, y, z)

    return _WIDE(_WIDE, _WIDE, _WIDE), generate


@intrinsic
def scaled(typing_context, x, y):
    """x y."""
    return _WIDE(_WIDE, _WIDE), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def least(typing_context, x, y):
    """The smaller one in each lane; y where x is not a number."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered("<", *arguments), *arguments)

    return _WIDE(_WIDE, _WIDE), generate


@intrinsic
def greatest(typing_context, x, y):
    """The greater one in each lane; y where x is not a number."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return _WIDE(_WIDE, _WIDE), generate


def _folded(builder, lanes, join):
    """All lanes joined, halves first."""
    for width in (8, 4, 2, 1):
        low, high = (builder.shuffle_vector(lanes, lanes, ints(range(first, first + width))) for first in (0, width))
        lanes = join(low, high)
    return builder.extract_element(lanes, ir.Constant(INT, 0))


@intrinsic
def total(typing_context, lanes):
    """The sum of the lanes."""
    return types.float32(_WIDE), lambda context, builder, signature, arguments: _folded(builder, arguments[0], builder.fadd)


@intrinsic
def peak(typing_context, lanes):
    """The greatest of the lanes."""

    def generate(context, builder, signature, arguments):
        return _folded(builder, arguments[0], lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))

    return types.float32(_WIDE), generate


_LOG2_E, _LN_2 = 1.44269504088896341, (0.693359375, -2.12194440e-4)
_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of (e^x - 1 - x) / x^2 for |x| <= ln 2 / 2: Cephes (S. Moshier), expf."""
_SMALL = -87.0


@intrinsic
def exp(typing_context, lanes):
    """e^x for x <= 0, within 2e-7 of it; below -87, and so for -inf, 0."""

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        round_ = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS]), "llvm.rint.v16f32")
        whole = builder.call(round_, [builder.fmul(x, constant(_LOG2_E))])
        rest = fma(builder, whole, constant(-_LN_2[1]), fma(builder, whole, constant(-_LN_2[0]), x))
        series = constant(_SERIES[0])
        for factor in _SERIES[1:]:
            series = fma(builder, series, rest, constant(factor))
        series = builder.fadd(fma(builder, series, builder.fmul(rest, rest), rest), constant(1.0))
        power = builder.shl(builder.add(builder.fptosi(whole, INTS), ints([127] * 16)), ints([23] * 16))
        found = builder.fmul(series, builder.bitcast(power, FLOATS))
        return builder.select(builder.fcmp_ordered("<", x, constant(_SMALL)), constant(0.0), found)

    return _WIDE(_WIDE), generate


@intrinsic
def fetch(typing_context, array, at):
    """Brings the line of the cache that array[at] is in, without waiting for it."""

    def generate(context, builder, signature, arguments):
        place = Array(context, builder, array, arguments[0]).place(arguments[1], BYTE)
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
        read, near, data = (ir.Constant(INT, n) for n in (0, 3, 1))
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [place, read, near, data])
        return context.get_dummy_value()

    return types.void(array, _U), generate
