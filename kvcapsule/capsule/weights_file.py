"""model.safetensors of a capsule: a header that is checked before any tensor is read, and written in one order.

    length of the header, 8 bytes, little-endian
    header, JSON: {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}, ...}, padded with spaces
    data of the tensors, one behind the other

Any reader of safetensors reads it. Its own reader is not used: it maps the file, so that tensors would be in memory
twice, and it writes the metadata in a random order.
"""

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ..errors import CapsuleError, shortened
from .limits import plain_json
from .tensor_bytes import DTYPES, MOST_HEAD_BYTES, Form

METADATA = "__metadata__"
LFS_POINTER = b"version https://git-lfs"
LARGEST = 1e12
"""Largest magnitude of a number: products of two such still fit fp32. What trained codecs hold is below 1,000."""
_DTYPES = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_DIMENSIONS = 8
_AT_ONCE = 2**20
"""Numbers that are checked together."""
_AGAIN = "Save, copy or download the capsule again."


class Header(NamedTuple):
    """What the head of a weights file announces: metadata, tensors and where their data begins."""

    metadata: dict[str, str]
    forms: dict[str, Form]
    """Of the tensors, by name, in the order of their data."""
    size: int
    """Bytes before the data."""


def write(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file; equal tensors give equal bytes, in whatever order they are given.

    Raises:
        CapsuleError: for a tensor of a dtype that a capsule cannot have, or with numbers that no capsule is loaded
            with.
    """
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype not in _NAMES]:
        raise CapsuleError(f"{wrong[0]} holds {tensors[wrong[0]].dtype}; it may hold {', '.join(_NAMES.values())}.")
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    table: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    parts, begin = [], 0
    for name, tensor in ordered.items():
        require_numbers("the capsule cannot be saved: training diverged, or it was filled wrongly", name, tensor)
        end = begin + tensor.nbytes
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        parts.append(bytes(_bytes_of(tensor.detach().cpu().contiguous())))
        begin = end
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def read_header(path: Path) -> Header:
    """What the file announces, which its size agrees with.

    Raises:
        CapsuleError: if it cannot be read, is damaged, or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            return _header(path, file)
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_tensors(path: Path, header: Header) -> dict[str, torch.Tensor]:
    """The tensors, each in memory of its own, on the CPU; header: of the same file, already compared with what is
    expected, as memory for all tensors is taken.

    Raises:
        CapsuleError: if the file cannot be read, or holds NaN, infinite or very large numbers.
    """
    tensors = {}
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(header.size)
            for name, form in header.forms.items():
                tensor = torch.empty(form.shape, dtype=form.dtype)
                _fill(file, tensor, path)
                require_numbers(f"{path} is damaged", name, tensor)
                tensors[name] = tensor
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror or error}.") from error
    return tensors


def require_numbers(what: str, name: str, tensor: torch.Tensor) -> None:
    """Raises CapsuleError, beginning with `what`, unless all numbers of a tensor are below LARGEST."""
    if not tensor.is_floating_point():
        return
    for part in tensor.detach().flatten().split(_AT_ONCE):
        low, high = (part.float() if part.element_size() < 2 else part).aminmax() if len(part) else (0.0, 0.0)
        # NaN is in no range.
        if not (float(low) >= -LARGEST and float(high) <= LARGEST):
            raise CapsuleError(f"{what}: {name} holds NaN, infinite numbers or some above {LARGEST:g}.")


def _header(path: Path, file: BinaryIO) -> Header:
    size, start = os.fstat(file.fileno()).st_size, file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise CapsuleError(
            f"{path} cannot be read: it is a pointer of Git LFS, not the weights. Run `git lfs pull` in the repository."
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size - 8, MOST_HEAD_BYTES):
        raise CapsuleError(
            f"{path} cannot be read: its {size:,} bytes are no safetensors file, or only the beginning of one. {_AGAIN}"
        )
    file.seek(8)
    try:
        table = plain_json(file.read(length))
        metadata = table.pop(METADATA, {})
        offsets = {name: tuple(entry["data_offsets"]) for name, entry in table.items()}
        forms = {name: _form(name, table[name]) for name in sorted(table, key=lambda name: offsets[name])}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no object")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CapsuleError(f"{path} cannot be read: it is no sound safetensors file ({error}). {_AGAIN}") from error
    end = 0
    for name, form in forms.items():
        begin, end = end, end + form.dtype.itemsize * prod(form.shape)
        if offsets[name] != (begin, end):
            raise CapsuleError(
                f"{path} cannot be read: it is no sound safetensors file ({shortened(name)!r} does not lie where its"
                f" shape says). {_AGAIN}"
            )
    if size != 8 + length + end:
        raise CapsuleError(
            f"{path} cannot be read: it has {size:,} bytes where its header announces {8 + length + end:,}, so it was"
            f" cut off or overwritten. {_AGAIN}"
        )
    return Header(metadata, forms, 8 + length)


def _form(name: str, entry: dict[str, Any]) -> Form:
    dtype, shape = entry["dtype"], entry["shape"]
    known = isinstance(dtype, str) and dtype in _DTYPES and isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
    if not known or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"{shortened(name)!r} has no form that kvcapsule knows")
    return Form(_DTYPES[dtype], tuple(shape))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _fill(file: BinaryIO, tensor: torch.Tensor, path: Path) -> None:
    rest = _bytes_of(tensor)
    while len(rest):
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise CapsuleError(f"{path} cannot be read: it became shorter meanwhile. {_AGAIN}")
        rest = rest[count:]
