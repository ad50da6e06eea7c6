"""Named tensors and a JSON object as bytes: safetensors, written in one order, with a checksum, and read strictly.

    length of the head, 8 bytes, little-endian
    head, JSON: {"__metadata__": {KEY: JSON of the object and "sha256"}, name: {"dtype", "shape", "data_offsets"}, ...}
    data of the tensors, in the order of the head: by size of an element, largest first, then by name

Any reader of safetensors reads it. This reader takes only what the writer writes, byte for byte.
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from ..errors import CapsuleError

MOST_HEAD_BYTES = 4 * 2**20
"""Largest head that is read or written: some ten thousand tensors."""
CHECKSUM = "sha256"
_MOST_DIMENSIONS = 8
_LARGEST_SIZE = 2**40
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Numbers that can be stored, by their name in safetensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Form(NamedTuple):
    """What is known of a tensor without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Contents(NamedTuple):
    """Bytes whose head was read, and whose tensors were not."""

    values: dict[str, Any]
    """The JSON object; it holds no fractions."""
    forms: dict[str, Form]
    """Of the tensors, by name."""
    checksum: str
    """As the bytes give it."""
    actual_checksum: str
    """Of what is in them."""
    data: memoryview

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, each in memory of its own, on the CPU."""
        tensors, begin = {}, 0
        for name, form in self.forms.items():
            size = _nbytes(form)
            if size:
                numbers = bytearray(self.data[begin : begin + size])
                tensors[name] = torch.frombuffer(numbers, dtype=form.dtype).view(form.shape)
            else:
                tensors[name] = torch.empty(form.shape, dtype=form.dtype)
            begin += size
        return tensors


def write(key: str, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a JSON object and of tensors.

    Args:
        key: of the metadata, under which the object stands.
        values: the object, in JSON's types without fractions.
        tensors: of dtypes in DTYPES.

    Raises:
        CapsuleError: for another dtype, or too many tensors.
    """
    if wrong := sorted({str(t.dtype) for t in tensors.values()} - {str(dtype) for dtype in _NAMES}):
        raise CapsuleError(f"tensors of {', '.join(wrong)} cannot be stored; they may hold {', '.join(DTYPES)}.")
    forms = _in_order({name: Form(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    numbers = [tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy() for name in forms]
    data = b"".join(array.tobytes() for array in numbers)
    head = _head(key, values, forms, _checksum(values, forms, data))
    if len(head) > MOST_HEAD_BYTES:
        raise CapsuleError(f"{len(tensors):,} tensors need a head of {len(head):,} bytes: too many to be stored.")
    return len(head).to_bytes(8, "little") + head + data


def read(key: str, content: bytes, what: str) -> Contents:
    """The head of what `write` wrote, checked but for the checksum, which the caller compares.

    Args:
        key: of the metadata.
        content: the bytes.
        what: name of the thing that they hold, in messages.

    Raises:
        CapsuleError: that names the fault.
    """
    view = memoryview(content)
    if len(view) < 8:
        raise CapsuleError(f"{len(view)} bytes are no {what}: it begins with eight bytes that give its head's length.")
    size = int.from_bytes(view[:8], "little")
    if size > min(MOST_HEAD_BYTES, len(view) - 8):
        raise CapsuleError(
            f"this {what} has {len(view):,} bytes and announces a head of {size:,}: it was cut off, or is none."
        )
    values, table = _parsed(key, bytes(view[8 : 8 + size]), what)
    forms = {name: _form(name, entry, what) for name, entry in table.items()}
    expected = 8 + size + sum(map(_nbytes, forms.values()))
    if len(view) != expected:
        raise CapsuleError(
            f"this {what} has {len(view):,} bytes where its head announces {expected:,}: it was cut off, or something"
            " was appended."
        )
    checksum = values.pop(CHECKSUM, None)
    data = view[8 + size :]
    if not isinstance(checksum, str):
        raise CapsuleError(f"this {what} has no {CHECKSUM}: it is damaged.")
    if list(forms) != list(_in_order(forms)) or _head(key, values, forms, checksum) != view[8 : 8 + size]:
        raise CapsuleError(f"the head of this {what} is not in the form in which kvcapsule writes it: it is damaged.")
    return Contents(values, forms, checksum, _checksum(values, forms, data), data)


def _in_order(forms: Mapping[str, Form]) -> dict[str, Form]:
    return dict(sorted(forms.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _nbytes(form: Form) -> int:
    return form.dtype.itemsize * prod(form.shape)


def _json(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _table(forms: Mapping[str, Form]) -> dict[str, Any]:
    table, begin = {}, 0
    for name, form in forms.items():
        end = begin + _nbytes(form)
        table[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [begin, end]}
        begin = end
    return table


def _head(key: str, values: Mapping[str, Any], forms: Mapping[str, Form], checksum: str) -> bytes:
    document = {"__metadata__": {key: _json({**values, CHECKSUM: checksum})}, **_table(forms)}
    head = json.dumps(document, separators=(",", ":")).encode()
    return head + b" " * (-len(head) % 8)


def _checksum(values: Mapping[str, Any], forms: Mapping[str, Form], data: bytes | memoryview) -> str:
    digest = hashlib.sha256(f"{_json(values)}\n{_json(_table(forms))}\n".encode())
    digest.update(data)
    return digest.hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def _no_number(text: str) -> None:
    raise ValueError(f"{text[:20]} is no whole number")


def _loads(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_no_number)


def _parsed(key: str, head: bytes, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON object, and the entries of the tensors."""
    try:
        document = _loads(head)
        metadata = document.pop("__metadata__") if isinstance(document, dict) else None
        values = _loads(metadata[key]) if isinstance(metadata, dict) and list(metadata) == [key] else None
        # Nested more deeply than can be written again.
        _json(values)
    except (RecursionError, TypeError, ValueError) as error:
        raise CapsuleError(f"the head of this {what} is not JSON ({error}): it is damaged.") from error
    except KeyError:
        values = None
    if not isinstance(values, dict):
        raise CapsuleError(f"these bytes are no {what}: their metadata is not one {key}.")
    return values, document


def _form(name: str, entry: Any, what: str) -> Form:
    dtype: Any
    shape: Any
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    known = isinstance(dtype, str) and dtype in DTYPES and isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
    if not known or not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in shape):
        raise CapsuleError(f"tensor {name[:80]!r} of this {what} has no form that kvcapsule knows: it is damaged.")
    return Form(DTYPES[dtype], tuple(shape))
