"""Operator level: one call of decode attention of one layer, by every method and by the full cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from kvcapsule.kernels import attend, backend_for
from kvcapsule.segments.segment import Segment

from . import byte_formula, bytes_touched, correctness, full_attention, layer_data, random_methods
from .interleaved_timing import Contender, Times, copies, interleave
from .layer_data import Cell
from .method_names import COMPACT, SHARES
from .shapes import SHAPES, Shape, distinct

LEVEL = "operator"
_BANK = 512 * 4 * 4
"""Bytes that encoding a token of a KV head takes in a compact capsule: an fp32 number for each training query, a few
times over."""


class Untimed(NamedTuple):
    """A contender of which all but the time is known."""

    name: str
    calls: Sequence[Callable[[], torch.Tensor]]
    bytes: int
    """Bytes that a call must read."""
    formula: float
    """These bytes in closed form."""
    error: float
    """Relative error of the output."""
    touched: bytes_touched.Touched | None
    """None where kernels run that PyTorch does not dispatch."""


class Limits(NamedTuple):
    """Limits of memory and time for one cell."""

    memory: int
    """Bytes of all contenders' data."""
    rounds: int
    seconds: float
    """Seconds of a contender, warm-up not included."""


def cells(
    shapes: Iterable[str], visual: Sequence[int], batches: Sequence[int], make: Callable[[Shape, int, int], Cell]
) -> Iterator[Cell]:
    """The cells to measure; shapes with equal layers are measured once."""
    for name in distinct(list(shapes)):
        for tokens in visual:
            for batch in batches:
                yield make(SHAPES[name], tokens, batch)


def equal_shapes(names: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of `skipped` for the shapes whose layers equal those of another shape."""
    return [
        _skipped(other, None, None, None, f"one layer of it is like one of {first}, which is timed")
        for first, others in distinct(list(names)).items()
        for other in others
    ]


@torch.no_grad()
def measure(
    cell: Cell, names: Sequence[str], limits: Limits, read_gb_s: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one cell, the full cache's first, and what was left out.

    Args:
        cell: the shape, batch and tokens.
        names: of `method_names.METHODS`.
        limits: of memory and time.
        read_gb_s: read bandwidth of the machine, which `bandwidth_fraction` is a fraction of.
    """
    skipped: list[dict[str, Any]] = []
    if (needed := _needed(cell, names)) > limits.memory:
        return [], [_skipped(cell.shape.name, cell.batch, cell.visual, None, _too_large(needed, limits.memory))]
    layer = layer_data.draw(cell)
    untimed = []
    for name in (*full_attention.IN_PLACE, *full_attention.WITH_COPIES):
        extra = full_attention.extra_bytes(name, cell.full_bytes, cell.shape.group)
        if needed + extra > limits.memory:
            skipped.append(
                _skipped(cell.shape.name, cell.batch, cell.visual, name, _too_large(needed + extra, limits.memory))
            )
            continue
        untimed.append(_of_full(name, cell, layer))
    untimed += [_of_method(name, cell, layer) for name in names]
    right = [m for m in untimed if m.error <= correctness.TOLERANCE[cell.dtype]]
    times = interleave([Contender(m.name, m.calls) for m in right], cell.device, limits.rounds, limits.seconds)
    return rows(cell, untimed, times, read_gb_s), skipped


def rows(cell: Cell, untimed: Sequence[Untimed], times: dict[str, Times], read_gb_s: float) -> list[dict[str, Any]]:
    """JSON rows; a contender whose output is wrong has no times."""
    strongest = min(
        (name for name in full_attention.IN_PLACE if name in times), key=lambda name: times[name].median, default=None
    )
    result = []
    for m in untimed:
        time, base = times.get(m.name), times.get(strongest or "")
        result.append(
            {
                "level": LEVEL,
                "geometry": cell.shape.name,
                "batch": cell.batch,
                "visual_tokens": cell.visual,
                "text_tokens": cell.text + layer_data.TAIL,
                "method": m.name,
                "baseline": strongest,
                "ratio": time.over(base) if time and base else None,
                "bytes": m.bytes,
                "formula_bytes": round(m.formula),
                "touched_bytes": m.touched and m.touched.stored,
                "traffic_bytes": m.touched and m.touched.traffic,
                "bytes_ratio": cell.full_bytes / m.bytes,
                "seconds": time and time.median,
                "iqr_seconds": time and time.iqr,
                "rounds": len(time.rounds) if time else 0,
                "copies": len(m.calls),
                "bandwidth_fraction": m.bytes / time.median / 1e9 / read_gb_s if time else None,
                "error": m.error if m.error < float("inf") else None,
                "failed": (
                    None
                    if time
                    else (
                        f"relative error {m.error:.1e}, at most {correctness.TOLERANCE[cell.dtype]:.0e} is allowed: not"
                        " timed"
                    )
                ),
            }
        )
    return result


def _of_full(name: str, cell: Cell, layer: layer_data.Layer) -> Untimed:
    attention, scale = {**full_attention.IN_PLACE, **full_attention.WITH_COPIES}[name], cell.shape.head_dim**-0.5
    cache = full_attention.FullCache(layer.keys, layer.values)
    truth = correctness.over_rows(layer.query, *cache, scale)
    others = [
        full_attention.FullCache(*(x.clone() for x in cache)) for _ in range(copies(cell.full_bytes, cell.device) - 1)
    ]
    calls = [partial(attention, layer.query, one, scale) for one in (cache, *others)]
    counted = bytes_touched.count(calls[0], cache)
    return Untimed(name, calls, cell.full_bytes, byte_formula.full(cell), correctness.error(calls[0](), truth), counted)


def _of_method(name: str, cell: Cell, layer: layer_data.Layer) -> Untimed:
    scale = cell.shape.head_dim**-0.5
    method = random_methods.make(name, cell.shape.geometry(1), cell.tile, cell.device, cell.dtype, cell.seed)
    segments = layer_data.store(cell, layer, method)
    stored = layer_data.bytes_read(segments)
    truth = correctness.over_segments(layer.query, segments, scale)
    others = [layer_data.copied(segments) for _ in range(copies(stored, cell.device) - 1)]
    calls = [_call(layer.query, one, scale) for one in (segments, *others)]
    tensors = [t for s in segments for t in (*s.entry_tensors(), *s.parameter_tensors())]
    calls[0]()
    seen = backend_for(cell.device.type) != "triton"
    by_kernels = bytes_touched.read_by_kernels(layer.query, segments, scale)
    counted = bytes_touched.count(calls[0], tensors, by_kernels) if seen else None
    return Untimed(
        name, calls, stored, byte_formula.of(name, cell, method), correctness.error(calls[0](), truth), counted
    )


def _call(query: torch.Tensor, segments: list[Segment], scale: float) -> Callable[[], torch.Tensor]:
    return lambda: attend(query, segments, scale)


def _needed(cell: Cell, names: Sequence[str]) -> int:
    """Bytes of all contenders' data, and of encoding one or two sequences."""
    shares = [SHARES.get(name, 1.0) for name in names]
    # The copies that the contenders take in turn: the more of them, the larger the last-level cache.
    sizes = [int(share * cell.full_bytes) for share in shares]
    sizes += [cell.full_bytes] * len((*full_attention.IN_PLACE, *full_attention.WITH_COPIES))
    again = sum((copies(size, cell.device) - 1) * size for size in sizes)
    # A few copies of the sequences that are encoded, in fp32; a compact capsule holds what its bank gives every token.
    encoded = min(cell.batch, layer_data.DIFFERENT)
    encoding = 24 * encoded * cell.full_bytes // cell.batch // cell.dtype.itemsize
    bank = encoded * cell.visual * cell.shape.kv_heads * _BANK if COMPACT & set(names) else 0
    return int((1.0 + sum(shares)) * cell.full_bytes) + again + max(encoding, bank)


def _too_large(needed: int, limit: int) -> str:
    return f"needs {needed / 2**30:.1f} GiB, and --memory-gib allows {limit / 2**30:.1f}"


def _skipped(geometry: str, batch: int | None, visual: int | None, method: str | None, reason: str) -> dict[str, Any]:
    return {
        "level": LEVEL,
        "geometry": geometry,
        "batch": batch,
        "visual_tokens": visual,
        "method": method,
        "reason": reason,
    }
