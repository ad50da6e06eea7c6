"""A store's entries in the host's memory, for the threads of one process."""

import io
import time
from threading import RLock
from typing import BinaryIO

from .entry_backend import Evicted, StoredEntry, surplus


class Memory:
    """Entries by their name, in the order of their use."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[bytes, int]] = {}
        """Content and the time of the last use, by name; least recently used first."""
        self._lock = RLock()

    def open(self, digest: str) -> BinaryIO | None:
        with self._lock:
            entry = self._entries.get(digest)
        return None if entry is None else io.BytesIO(entry[0])

    def touch(self, digest: str) -> None:
        with self._lock:
            entry = self._entries.pop(digest, None)
            if entry is not None:
                self._entries[digest] = (entry[0], time.time_ns())

    def write(self, digest: str, content: bytes, max_bytes: int) -> Evicted:
        with self._lock:
            self._entries.pop(digest, None)
            self._entries[digest] = (content, time.time_ns())
            return self._evict(max_bytes, spared=digest)

    def remove(self, digest: str) -> None:
        with self._lock:
            self._entries.pop(digest, None)

    def stored(self) -> list[StoredEntry]:
        with self._lock:
            return [StoredEntry(digest, len(content), used) for digest, (content, used) in self._entries.items()]

    def evict(self, max_bytes: int) -> Evicted:
        with self._lock:
            return self._evict(max_bytes)

    def _evict(self, max_bytes: int, spared: str = "") -> Evicted:
        chosen = surplus(self.stored(), max_bytes, spared)
        for entry in chosen:
            self.remove(entry.digest)
        return Evicted(len(chosen), sum(entry.bytes for entry in chosen))
