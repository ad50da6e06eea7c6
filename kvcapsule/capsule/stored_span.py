"""Stored spans: the segments of one visual span in all layers, as bytes and back, without a model.

    data = to_bytes(span, capsule)
    span = from_bytes(data, capsule)

The bytes hold what the span alone needs; the codecs' maps come from the capsule, which must be the one that made it.
Rows that layers share are stored once, and are shared again after reading. The format is described in
checkpoints/FORMAT.md.
"""

from typing import NamedTuple

import torch

from ..errors import CapsuleError
from ..segments.packed_rows import Rows, stored_tensors
from ..segments.rotary_frame import Frame
from ..segments.segment import Segment
from . import tensor_bytes
from .capsule import Capsule
from .digest import capsule_digest
from .span_form import COS, SIN, SpanForm, require_template
from .span_header import SPAN_FORMAT_VERSION, SpanHeader, frame_name, require_version

__all__ = ["SPAN_FORMAT_VERSION", "SpanHeader", "StoredSpan", "capsule_digest", "from_bytes", "read_header", "to_bytes"]

KEY = "kvcapsule_span"
"""Key of the safetensors metadata."""
WHAT = "stored span"
_UNIT = 1e-3
"""By how much cos^2 + sin^2 of a frame may differ from 1."""


class StoredSpan(NamedTuple):
    """One visual span of one batch row, in all layers, with the text right before it."""

    header: SpanHeader
    visual: dict[int, list[Segment]]
    """By layer: the segment of its tiles, if it fills one, then the raw rows of what is left, if anything is."""
    text: dict[int, list[Segment]]
    """By layer: the raw rows of the text before it, if there is any."""


def to_bytes(span: StoredSpan, capsule: Capsule) -> bytes:
    """A span as bytes; equal spans are equal bytes.

    Args:
        span: as CapsuleCache.stored_spans gives it.
        capsule: the capsule that made it.

    Raises:
        CapsuleError: if another capsule made it, it is not what its header says, a number is not finite, or its codec
            family makes what cannot be stored (rows without `with_tensors`, maps that depend on the image).
    """
    _require_capsule(span.header, capsule)
    form = SpanForm.of(span.header, capsule, _device(span))
    tensors = _tensors(span, form)
    form.require({name: tensor_bytes.Form(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    _require_numbers(tensors)
    return tensor_bytes.write(KEY, span.header.to_dict(), tensors)


def from_bytes(data: bytes, capsule: Capsule, device: torch.device | str = "cpu") -> StoredSpan:
    """The span that bytes hold, checked before anything of it is used.

    Args:
        data: what `to_bytes` made.
        capsule: the capsule that made the span; its maps become those of the segments.
        device: where to put what is stored; the capsule's codecs must lie there too if attention is to read it.

    Raises:
        CapsuleError: if the bytes are damaged, of another format version or another capsule, or do not hold what their
            header and the capsule ask for.
    """
    contents, header = _opened(data)
    _require_capsule(header, capsule)
    form = SpanForm.of(header, capsule, device)
    form.require(contents.forms)
    tensors = contents.tensors()
    _require_numbers(tensors)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return StoredSpan(header, form.segments(tensors), form.text(tensors))


def read_header(data: bytes) -> SpanHeader:
    """The header of bytes that `to_bytes` made, without a capsule.

    Raises:
        CapsuleError: if the bytes are damaged or of another format version.
    """
    return _opened(data)[1]


def _opened(data: bytes) -> tuple[tensor_bytes.Contents, SpanHeader]:
    contents = tensor_bytes.read(KEY, data, WHAT)
    require_version(contents.values.get("format_version"))
    if contents.checksum != contents.actual_checksum:
        raise CapsuleError(
            f"this {WHAT} is damaged: its {tensor_bytes.CHECKSUM} is {contents.actual_checksum[:16]}... where it says"
            f" {contents.checksum[:16]}.... Encode the image again."
        )
    return contents, SpanHeader.from_dict(contents.values)


def _require_capsule(header: SpanHeader, capsule: Capsule) -> None:
    digest = capsule_digest(capsule)
    if header.capsule != digest:
        raise CapsuleError(
            f"this {WHAT} was made by the capsule {header.capsule[:16]}... and this capsule is {digest[:16]}...: give"
            " the capsule that made it, or encode the image again."
        )


def _device(span: StoredSpan) -> torch.device:
    owners = [s.owner for segments in span.visual.values() for s in segments]
    return owners[0].device if owners else torch.device("cpu")


def _tensors(span: StoredSpan, form: SpanForm) -> dict[str, torch.Tensor]:
    """All that is stored, by name."""
    header, tensors = span.header, dict[str, torch.Tensor]()
    if tuple(span.visual) != header.layers or tuple(span.text) != header.layers:
        raise CapsuleError(f"segments of the layers {list(span.visual)} where the header names {list(header.layers)}.")
    tiles: dict[int, Segment] = {}
    for layer in header.layers:
        visual, text = list(span.visual[layer]), list(span.text[layer])
        expected = (bool(header.tiles) + bool(header.rest), int(header.text > 0))
        if (len(visual), len(text)) != expected:
            raise CapsuleError(
                f"layer {layer} has {len(visual)} visual and {len(text)} text segments where the header asks for"
                f" {expected[0]} and {expected[1]}."
            )
        if header.tiles:
            tiles[layer] = visual.pop(0)
            require_template(tiles[layer], form.template[layer], layer, header.family)
            if (bias := tiles[layer].bias) is not None:
                tensors[f"layers.{layer}.bias"] = bias
        for part, segments in (("rest", visual), ("text", text)):
            for segment in segments:
                keys, values = segment.keys, segment.values
                if not (segment.plain and isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)):
                    raise CapsuleError(f"the {part} of layer {layer} is not raw rows of one batch row.")
                if segment.bias is not None or segment.mask is not None:
                    raise CapsuleError(f"the {part} of layer {layer} has a bias or padding: it must be rows alone.")
                tensors |= {f"layers.{layer}.{part}.keys": keys, f"layers.{layer}.{part}.values": values}
    known: dict[str, Rows] = {}
    for name, layer, part, _ in form.coded():
        rows = getattr(tiles[layer], part)
        if not _equal(known.setdefault(name, rows), rows):
            raise CapsuleError(
                f"the {part} of layer {layer} differ from {name}, which the family {header.family} shares."
            )
        tensors |= {f"{name}.{index}": tensor for index, tensor in enumerate(stored_tensors(rows))}
    frames = [segment.frame for segment in tiles.values()]
    if tiles and (frame := _common(frames, header)) is not None:
        tensors |= {COS: frame.cos, SIN: frame.sin}
    return tensors


def _equal(one: Rows, other: Rows) -> bool:
    return one is other or all(
        a is b or torch.equal(a, b.to(a.device))
        for a, b in zip(stored_tensors(one), stored_tensors(other), strict=True)
    )


def _common(frames: list[Frame | None], header: SpanHeader) -> Frame | None:
    """The frame of all layers."""
    first = frames[0]
    if frame_name(first) != header.frame:
        raise CapsuleError(f"the tiles' frame is {frame_name(first)} where the header says {header.frame}.")
    for frame in frames[1:]:
        if (frame is None) != (first is None):
            raise CapsuleError("some layers have frames and others have none: such spans cannot be stored.")
        if first is None or frame is None or frame is first:
            continue
        if not all(torch.equal(a, b.to(a.device)) for a, b in zip(first.tensors(), frame.tensors(), strict=True)):
            raise CapsuleError("the layers' frames differ: such spans cannot be stored.")
    return first


def _require_numbers(tensors: dict[str, torch.Tensor]) -> None:
    """Raises CapsuleError for numbers that are not finite, and for a frame that is no rotation."""
    wrong = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if wrong:
        listed = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CapsuleError(f"numbers that are not finite stand in {listed}: such a span cannot be read.")
    if COS in tensors:
        off = (tensors[COS].double().square() + tensors[SIN].double().square() - 1).abs()
        if off.numel() and float(off.max()) > _UNIT:
            raise CapsuleError(
                f"{COS} and {SIN} are no rotation: cos^2 + sin^2 differs from 1 by {float(off.max()):.3g}."
            )
