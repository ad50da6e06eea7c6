"""ImageStore: bytes under keys, in a folder or in the host's memory, with a budget.

It never fails a generation: what cannot be read is a miss, what cannot be written is not stored, and either is logged
in one line.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..errors import ConfigError
from .entry import DamagedEntryError, Header, StoreKey, encode, read_entry, read_header
from .entry_backend import EntryBackend, Evicted
from .folder import Folder
from .memory import Memory

_log = logging.getLogger(__name__)


@dataclass
class Statistics:
    """What a store has done in this process."""

    hits: int = 0
    misses: int = 0
    puts: int = 0
    """Entries written."""
    evictions: int = 0
    """Entries that this process removed to make room."""
    damaged: int = 0
    """Entries that were not as they had been written; each is a miss as well."""
    refused: int = 0
    """Entries that were not stored: larger than the budget, or the disk refused."""
    skipped: int = 0
    """Calls of generate that ran without the store, because it cannot serve what they asked for."""


class Entry(NamedTuple):
    """An entry of a listing."""

    digest: str
    bytes: int
    """On disk, header included."""
    last_used: float
    """Seconds since 1970."""
    header: Header | None
    """None: it cannot be read."""


class Damage(NamedTuple):
    """An entry that a check found wanting."""

    digest: str
    reason: str


class ImageStore:
    """Bytes under keys, least recently used first to go.

    Args:
        path: a folder, made if missing, that several processes may share; None: the host's memory.
        max_bytes: most bytes of all entries together, headers included.

    Raises:
        ConfigError: for a path that is no folder and cannot be made one, and for a budget below 0.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, max_bytes: int) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ConfigError(f"max_bytes {max_bytes!r}: give the most bytes that a store may hold, a whole number.")
        self.path = None if path is None else Path(path).expanduser()
        self.max_bytes = max_bytes
        self.statistics = Statistics()
        self._lock = Lock()
        self._logged: set[str] = set()
        self._backend: EntryBackend = Memory() if self.path is None else Folder(_made(self.path))

    def get(self, key: StoreKey) -> bytes | None:
        """The data under a key; None, a miss, if there is none or any doubt about it. A damaged entry is removed."""
        data = self._read(key)
        self.count("misses" if data is None else "hits")
        if data is not None:
            self._backend.touch(key.digest)
        return data

    def put(self, key: StoreKey, data: bytes, about: Mapping[str, Any] | None = None) -> bool:
        """Store data under a key, and evict what no longer fits; whether it was stored.

        Args:
            key: of the entry.
            data: its content.
            about: what `kvcapsule store PATH list` shows of it, in JSON's types.
        """
        content = encode(key, data, about or {})
        if len(content) > self.max_bytes:
            self.log_once("size", f"an entry of {len(content):,} bytes is over the store's {self.max_bytes:,} bytes")
            self.count("refused")
            return False
        try:
            evicted = self._backend.write(key.digest, content, self.max_bytes)
        except OSError as error:
            self.log_once("write", f"nothing can be stored in {self.path}: {error.strerror or error}")
            self.count("refused")
            return False
        self.count("puts")
        self.count("evictions", evicted.entries)
        return True

    def discard(self, key: StoreKey) -> None:
        """Remove an entry whose data, just got, turned out to be unusable: the hit becomes a miss."""
        self.count("hits", -1)
        self.count("misses")
        self._discard(key.digest)

    def touch(self, keys: Iterable[StoreKey]) -> None:
        """Make entries the most recently used, the last key's above all."""
        for key in keys:
            self._backend.touch(key.digest)

    def total_bytes(self) -> int:
        """Of all entries, headers included.

        Raises:
            OSError: if the folder cannot be read; so do the methods below.
        """
        return sum(entry.bytes for entry in self._backend.stored())

    def entries(self) -> list[Entry]:
        """All entries with their headers, most recently used first."""
        entries = []
        for digest, size, last_used in reversed(self._backend.stored()):
            try:
                file = self._backend.open(digest)
                if file is None:
                    continue
                with file:
                    header: Header | None = read_header(file)
            except (DamagedEntryError, OSError):
                header = None
            entries.append(Entry(digest, size, last_used / 1e9, header))
        return entries

    def check(self, remove: bool = False) -> list[Damage]:
        """Read every entry, and name those that are damaged.

        Args:
            remove: also remove these.
        """
        damages = []
        for digest, *_ in self._backend.stored():
            try:
                file = self._backend.open(digest)
                if file is None:
                    continue
                with file:
                    read_entry(file, digest)
            except DamagedEntryError as error:
                damages.append(Damage(digest, str(error)))
            except OSError as error:
                damages.append(Damage(digest, f"it cannot be read: {error.strerror or error}"))
            else:
                continue
            if remove:
                self._backend.remove(digest)
        return damages

    def prune(self, max_bytes: int) -> Evicted:
        """Remove the least recently used entries until all are at most `max_bytes`, and what killed writers left."""
        evicted = self._backend.evict(max_bytes)
        self.count("evictions", evicted.entries)
        return evicted

    def count(self, name: str, by: int = 1) -> None:
        """Add to one of the statistics."""
        with self._lock:
            setattr(self.statistics, name, getattr(self.statistics, name) + by)

    def log_once(self, kind: str, message: str) -> None:
        """Log a line, if it is the first of its kind."""
        with self._lock:
            first = kind not in self._logged
            self._logged.add(kind)
        if first:
            _log.warning("image store: %s.", message)

    def _read(self, key: StoreKey) -> bytes | None:
        try:
            file = self._backend.open(key.digest)
            if file is None:
                return None
            with file:
                header, data = read_entry(file, key.digest)
            if header.key != key:
                raise DamagedEntryError("its key has the same digest and is another one")
        except DamagedEntryError as error:
            self.log_once("damage", f"the entry {key.digest} is not used: {error}")
            self._discard(key.digest)
            return None
        except OSError as error:
            self.log_once("read", f"an entry of {self.path} cannot be read: {error.strerror or error}")
            return None
        return data

    def _discard(self, digest: str) -> None:
        self.count("damaged")
        try:
            self._backend.remove(digest)
        except OSError as error:
            self.log_once("remove", f"an entry of {self.path} cannot be removed: {error.strerror or error}")


def _made(path: Path) -> Path:
    """The folder, made if missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"{path} is a file: name a folder for the image store.") from error
    except OSError as error:
        raise ConfigError(f"the image store's folder {path} cannot be made: {error.strerror or error}.") from error
    return path
