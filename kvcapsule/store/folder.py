"""A store's entries as files of a folder that several processes, and machines, may share.

Whatever happens, a reader sees a whole entry or none: an entry is written under a hidden name and then renamed. The
lock keeps the sum of all entries under the budget; nothing else depends on it, so a lock that cannot be had (a stopped
process, a file system without locks) is done without. A writer that was killed leaves a hidden file, which the next
write or eviction after a minute removes: it is no longer locked.
"""

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO
from uuid import uuid4

from .entry_backend import Evicted, StoredEntry, surplus

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".entry"
PARTIAL = ".partial"
LOCK = ".lock"
_NAME = re.compile(rf"([0-9a-f]{{64}}){re.escape(SUFFIX)}")
_LOCK_SECONDS = 10
"""Longest wait for another process that holds the lock."""
_UNLOCKED_SECONDS, _ABANDONED_SECONDS = 60, 600
"""Ages at which a hidden file is litter: one that nobody holds locked (its writer locks it just after making it), and
one where files cannot be locked."""


class Folder:
    """Entries as files; see the module."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, digest: str) -> BinaryIO | None:
        try:
            return self._file(digest).open("rb")
        except FileNotFoundError:
            return None

    def touch(self, digest: str) -> None:
        # The time of a use is the file's time of modification. A store that is only read, and not written, keeps it.
        with suppress(OSError):
            now = time.time_ns()
            os.utime(self._file(digest), ns=(now, now))

    def write(self, digest: str, content: bytes, max_bytes: int) -> Evicted:
        partial = self.path / f".{digest[:16]}.{uuid4().hex}{PARTIAL}"
        try:
            with ExitStack() as stack:
                with partial.open("xb") as file:
                    _try_lock(file)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                    # Before the file's own lock goes: whoever removes litter holds this one.
                    stack.enter_context(self._lock())
                now = time.time_ns()
                os.utime(partial, ns=(now, now))
                os.replace(partial, self._file(digest))
                return self._evict(max_bytes, spared=digest)
        finally:
            partial.unlink(missing_ok=True)

    def remove(self, digest: str) -> None:
        self._file(digest).unlink(missing_ok=True)

    def stored(self) -> list[StoredEntry]:
        stored = []
        with os.scandir(self.path) as files:
            for file in files:
                match = _NAME.fullmatch(file.name)
                if match is None:
                    continue
                # Another process may have removed it since.
                with suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        stored.append(StoredEntry(match[1], status.st_size, status.st_mtime_ns))
        return sorted(stored, key=lambda entry: (entry.last_used, entry.digest))

    def evict(self, max_bytes: int) -> Evicted:
        with self._lock():
            return self._evict(max_bytes)

    def _evict(self, max_bytes: int, spared: str = "") -> Evicted:
        self._remove_litter()
        chosen = surplus(self.stored(), max_bytes, spared)
        for entry in chosen:
            self.remove(entry.digest)
        return Evicted(len(chosen), sum(entry.bytes for entry in chosen))

    def _remove_litter(self) -> None:
        for partial in self.path.glob(f".*{PARTIAL}"):
            with suppress(OSError):
                if _abandoned(partial):
                    partial.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.path / LOCK).open("ab") as file:
            deadline = time.monotonic() + _LOCK_SECONDS
            while _try_lock(file) is False and time.monotonic() < deadline:
                time.sleep(0.005)
            try:
                yield
            finally:
                # A child that was forked meanwhile holds the file open: closing it would not be enough.
                if fcntl is not None:
                    with suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_UN)

    def _file(self, digest: str) -> Path:
        return self.path / f"{digest}{SUFFIX}"


def _try_lock(file: IO[bytes]) -> bool | None:
    """Lock a file until it is closed, if nobody holds it; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _abandoned(partial: Path) -> bool:
    """Whether nobody writes a hidden file any more."""
    with partial.open("rb") as file:
        age = time.time() - os.fstat(file.fileno()).st_mtime
        return age > _UNLOCKED_SECONDS and (free := _try_lock(file)) is not False and (free or age > _ABANDONED_SECONDS)
