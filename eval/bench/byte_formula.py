"""Bytes that a decode-attention call must read, in closed form, to compare the measured bytes with.

They are keys, values and all else that a method stores for its sequences, and the maps of its codec once. s: bytes of
an element; owners take 8 bytes an entry, a tile's frame 4 D. The widths of a transform code have no closed form: their
sum is read from the codec.
"""

from collections.abc import Callable

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.codec import PairCodec
from kvcapsule.codec.coded_compact import CodedCompactLayer
from kvcapsule.codec.transform import TransformKeys, TransformValues
from kvcapsule.methods.method import Method
from kvcapsule.methods.ratios import retained
from kvcapsule.segments.bit_packing import GROUP

from .layer_data import TAIL, Cell
from .random_methods import KEPT, RETAINED

_OWNER = 8


def full(cell: Cell) -> float:
    """The full cache: 2 B H N D s."""
    return cell.full_bytes


def of(name: str, cell: Cell, method: Method) -> float:
    """Bytes of a method of `method_names.METHODS`: of its visual tokens, and of raw rows for the prompt's text, for
    visual tokens that fill no tile and for the tail."""
    if name == "full-segments":
        return full(cell) + 3 * _OWNER * cell.batch
    tiled = name in _TILED
    left = cell.visual % cell.tile if tiled else 0
    raw = cell.text + TAIL + left
    segments = 3 if left else 2
    rows = cell.batch * (raw * cell.shape.token_bytes(cell.dtype.itemsize) + segments * _OWNER)
    return rows + (_TILED[name](cell, method) if tiled else _SPANS[name](cell))


def _kept(cell: Cell) -> float:
    rows = max(1, round(KEPT * cell.visual))
    return cell.batch * (rows * (cell.shape.token_bytes(cell.dtype.itemsize) + _bias(cell)) + _OWNER)


def _bias(cell: Cell) -> int:
    """Bytes of a row's biases: one number for each KV head."""
    return cell.shape.kv_heads * cell.dtype.itemsize


def _bits(bits: int) -> Callable[[Cell], float]:
    """b bits an element, in groups of eight tokens; a scale and a minimum for each channel of keys and of values."""

    def count(cell: Cell) -> float:
        channels = 2 * cell.shape.kv_heads * cell.shape.head_dim
        return cell.batch * (channels * (-(-cell.visual // 8) * bits + 2 * cell.dtype.itemsize) + _OWNER)

    return count


def _fp8(cell: Cell) -> float:
    """A byte an element."""
    return cell.batch * (cell.visual * cell.shape.token_bytes(1) + _OWNER)


def _turboquant(bits: int) -> Callable[[Cell], float]:
    """b bits a channel in groups of eight, and a length of two bytes for each head's key and value; a rotation [D, D]
    and 2^b levels in single precision, of keys and values together."""

    def count(cell: Cell) -> float:
        heads, dim = cell.shape.kv_heads, cell.shape.head_dim
        rows = cell.visual * 2 * heads * (bits * -(-dim // GROUP) + 2)
        return cell.batch * (rows + _OWNER) + 4 * (dim * dim + (1 << bits))

    return count


def _tiles(cell: Cell) -> int:
    return cell.batch * (cell.visual // cell.tile)


def _compact(cell: Cell, method: Method) -> float:
    rows = retained(KEPT, cell.tile)
    return _tiles(cell) * (
        rows * (cell.shape.token_bytes(cell.dtype.itemsize) + _bias(cell)) + _OWNER + 4 * cell.shape.head_dim
    )


def _coded_compact(cell: Cell, method: Method) -> float:
    """The bits of a head's channels a row, in whole bytes, a byte a channel with bits and one a row; the map [H, D, D]
    of the values, and units, centres and widths of the channels."""
    assert isinstance(method, Capsule)
    codec = method.layers[0]
    assert isinstance(codec, CodedCompactLayer)
    heads, dim, s = cell.shape.kv_heads, cell.shape.head_dim, cell.dtype.itemsize
    codings = codec.codings()
    stored = heads * codec.stored
    for form in (codings.keys, codings.values):
        stored += codec.stored * sum(form.row_bytes) + len(form.coded)
    shared = heads * dim * (dim * s + 2 * (2 * s + 1))
    return _tiles(cell) * (stored + _OWNER + 4 * dim) + shared


def _kvcapsule(cell: Cell, method: Method) -> float:
    """r of the rows of keys and values a tile; theta and the basis [H, T, m], the mean value [H, D]."""
    rows, heads, dim = retained(RETAINED, cell.tile), cell.shape.kv_heads, cell.shape.head_dim
    maps = (2 * heads * cell.tile * rows + heads * dim) * cell.dtype.itemsize
    return _tiles(cell) * (rows * cell.shape.token_bytes(cell.dtype.itemsize) + _OWNER + 4 * dim) + maps


def _transform(cell: Cell, method: Method) -> float:
    """The widths' sum a tile; token maps [H, T, M], channel maps [H, D, C], offsets [H, M, C], steps and widths [H, M /
    8, C]."""
    assert isinstance(method, Capsule) and isinstance(method.layers[0], PairCodec)
    heads, dim, s = cell.shape.kv_heads, cell.shape.head_dim, cell.dtype.itemsize
    keys, values = method.layers[0].keys, method.layers[0].values
    assert isinstance(keys, TransformKeys) and isinstance(values, TransformValues)
    codes, maps = 0, 0
    for transform in (keys.transform, values.transform):
        _, rows, channels = transform.offset.shape
        codes += int(transform.widths.long().sum())
        maps += heads * ((cell.tile * rows + dim * channels + rows * channels) * s + rows // 8 * channels * (s + 1))
    return _tiles(cell) * (codes + _OWNER + 4 * dim) + maps


_SPANS: dict[str, Callable[[Cell], float]] = {
    "kept-10%": _kept,
    "fp8": _fp8,
    **{f"int{bits}": _bits(bits) for bits in (8, 4, 2)},
    "turboquant4": _turboquant(4),
}
_TILED: dict[str, Callable[[Cell, Method], float]] = {
    "compact-10%": _compact,
    "coded-compact-10%": _coded_compact,
    "kvcapsule-r0.4": _kvcapsule,
    "transform-20x": _transform,
}
