"""The storage of an image store: the interface that a folder and the host's memory share."""

from typing import BinaryIO, NamedTuple, Protocol


class StoredEntry(NamedTuple):
    """An entry in a backend, unread."""

    digest: str
    """Its name: StoreKey.digest."""
    bytes: int
    """All of it, header included."""
    last_used: int
    """When it was written or last read, in nanoseconds since 1970."""


class Evicted(NamedTuple):
    """How much was removed to keep within a limit."""

    entries: int
    bytes: int


class EntryBackend(Protocol):
    """Holds entries by name, and evicts the least recently used first. Methods raise OSError where the system does."""

    def open(self, digest: str) -> BinaryIO | None:
        """An entry's bytes as a file, to be closed by the caller; None if there is none."""

    def touch(self, digest: str) -> None:
        """An entry was used just now."""

    def write(self, digest: str, content: bytes, max_bytes: int) -> Evicted:
        """Store an entry, whole or not at all, then evict others until all are at most `max_bytes`."""

    def remove(self, digest: str) -> None:
        """Remove an entry, if it is there."""

    def stored(self) -> list[StoredEntry]:
        """All entries, least recently used first."""

    def evict(self, max_bytes: int) -> Evicted:
        """Remove the least recently used entries until all are at most `max_bytes`."""


def surplus(stored: list[StoredEntry], max_bytes: int, spared: str = "") -> list[StoredEntry]:
    """The entries to remove, of a list with the least recently used first, so that at most `max_bytes` remain; not the
    one named `spared`."""
    total, chosen = sum(entry.bytes for entry in stored), []
    for entry in stored:
        if total <= max_bytes:
            break
        if entry.digest != spared:
            chosen.append(entry)
            total -= entry.bytes
    return chosen
