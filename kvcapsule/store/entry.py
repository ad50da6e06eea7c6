"""The form of one entry of a store: a checksum, the key's full description, and the data.

MAGIC                         a line of text with the version of this form
SHA-256 of all that follows   32 bytes
length of the header          8 bytes, little endian
header                        JSON: key, about, bytes (of the data)
data
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

MAGIC = b"kvcapsule image store 1\n"
_CHECKSUM, _LENGTH = hashlib.sha256().digest_size, 8
_LONGEST_HEADER = 1 << 24
"""Bytes; a length beyond it is damage, and is not read."""


class DamagedEntryError(ValueError):
    """Bytes that are no entry, or not the entry that was asked for. The message is the reason."""


@dataclass(frozen=True)
class StoreKey:
    """All that an entry depends on."""

    description: str
    """JSON with sorted keys; two keys are equal if it is the same text."""

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> "StoreKey":
        """The key of named values of JSON's types."""
        return cls(json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False))

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex: the entry's name."""
        return hashlib.sha256(self.description.encode()).hexdigest()


class Header(NamedTuple):
    """What an entry says of itself."""

    key: StoreKey
    about: dict[str, Any]
    """For people: the names of model and capsule, the grid and so on; no part of the key."""
    bytes: int
    """Of the data."""


def encode(key: StoreKey, data: bytes, about: Mapping[str, Any]) -> bytes:
    """An entry's bytes."""
    header = json.dumps({"key": key.description, "about": dict(about), "bytes": len(data)}).encode()
    length = len(header).to_bytes(_LENGTH, "little")
    checksum = hashlib.sha256(length)
    checksum.update(header)
    checksum.update(data)
    return b"".join([MAGIC, checksum.digest(), length, header, data])


def read_header(file: BinaryIO) -> Header:
    """The header at the beginning of an entry, which leaves the file at the data; the checksum is not tested.

    Raises:
        DamagedEntryError: if there is none.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise DamagedEntryError("it is no entry of this version")
    file.read(_CHECKSUM)
    length = int.from_bytes(file.read(_LENGTH), "little")
    if not 0 < length <= _LONGEST_HEADER:
        raise DamagedEntryError("its header is damaged")
    try:
        values = json.loads(file.read(length))
        header = Header(StoreKey(values["key"]), dict(values["about"]), int(values["bytes"]))
        _ = header.key.digest
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedEntryError("its header is damaged") from error
    return header


def read_entry(file: BinaryIO, digest: str) -> tuple[Header, bytes]:
    """Header and data of the entry with this name, its checksum tested.

    Raises:
        DamagedEntryError: if anything is not as it was written, or the entry is of another name.
    """
    header = read_header(file)
    start = file.tell()
    file.seek(len(MAGIC))
    expected = file.read(_CHECKSUM)
    checksum = hashlib.sha256(file.read(start - file.tell()))
    data = file.read()
    checksum.update(data)
    if len(data) != header.bytes:
        raise DamagedEntryError(f"it has {len(data):,} bytes of data where {header.bytes:,} were written")
    if checksum.digest() != expected:
        raise DamagedEntryError("its checksum is wrong")
    if header.key.digest != digest:
        raise DamagedEntryError("it is the entry of another key, under this one's name")
    return header, data
