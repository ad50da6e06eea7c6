"""Writing files and folders so that nothing is ever half written: to a temporary name first, then renamed."""

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from .folder_swap import exchange

NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew past the allowed size",
}
_ASIDE = ".old"
_PROCESS = uuid4().hex[:8]
"""Tells this process from an ended one of the same number: in a container that is started anew, numbers are."""


def to_json(values: Any) -> bytes:
    """JSON text in UTF-8 with a line end; raises ValueError for NaN and infinities."""
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text, keys in their order."""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def plain(value: Any, where: str) -> Any:
    """The value in JSON's types: tuples become lists, paths strings, array scalars numbers; NaN and infinities, which
    JSON lacks, None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item(), where)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a capsule's files cannot hold: give numbers, strings, lists and"
        " dicts."
    )


def replace_folder(target: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files beside `target`, then put them in its place by renaming; on failure `target` is what it was.

    A process that is killed meanwhile leaves the whole old folder or the whole new one: in its place, or, where the
    file system cannot exchange folders, beside it, from where `put_back` takes it.
    """
    put_back(target)
    unique = unique_name(target)
    partial, aside = target.with_name(f"{unique}.partial"), target.with_name(f"{unique}{_ASIDE}")
    try:
        partial.mkdir()
        for name, content in contents.items():
            write(partial / name, content)
        if target.exists():
            shutil.copymode(target, partial)
        _sync(partial)
        try:
            if not target.exists():
                partial.rename(target)
            elif not exchange(partial, target):
                target.rename(aside)
                partial.rename(target)
        except BaseException:
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)
    for replaced in (partial, aside):
        shutil.rmtree(replaced, ignore_errors=True)
    remove_litter(target)
    for replaced in (partial, aside):
        if replaced.exists():
            warnings.warn(
                f"the capsule is saved, but the one it replaced could not be removed: delete {replaced}.", stacklevel=4
            )


def put_back(target: Path) -> None:
    """Put back a folder that a process of this machine moved aside and was killed before it put the new one there.

    Raises:
        OSError: if there is such a folder and it cannot be renamed.
    """
    if os.path.lexists(target) or not os.path.isdir(target.parent):
        return
    try:
        ended = _ended(target.parent, f"{glob.escape(_litter_prefix(target))}*{_ASIDE}")
    except PermissionError:  # Where names may not be read, nothing was moved aside by this user.
        return
    aside = [path for path in ended if path.is_dir()]
    if aside:
        # Two processes may do so at once.
        with suppress(FileNotFoundError):
            max(aside, key=lambda path: path.stat().st_ctime_ns).rename(target)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the body writes there replaces `path`, or goes if the body fails.

    Raises:
        OSError: if it cannot be put on disk or renamed.
    """
    temporary = path.with_name(f"{unique_name(path)}.partial")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    remove_litter(path)


def unique_name(target: Path) -> str:
    """A hidden name for what lies beside `target` for a moment; it tells which process of which machine it is of."""
    return f"{_litter_prefix(target)}{os.getpid()}.{_PROCESS}{uuid4().hex[:12]}"


def remove_litter(target: Path) -> None:
    """Delete what processes of this machine that were killed while they wrote to `target` left beside it.

    It is for after `target` was written: of a process that was killed between its two renames, the litter is the only
    copy of what was there.
    """
    _remove_ended(target.parent, f"{glob.escape(_litter_prefix(target))}*")


def remove_litter_in(folder: Path, ending: str) -> None:
    """Delete what such processes left of any target in a folder whose name has this ending."""
    _remove_ended(folder, f".*{glob.escape(ending)}.{_machine()}-*")


def _remove_ended(folder: Path, pattern: str) -> None:
    """Remove litter that fits the pattern and whose process has ended."""
    for path in _ended(folder, pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _ended(folder: Path, pattern: str) -> list[Path]:
    """What fits the pattern and is of a process of this machine that has ended."""
    ended = []
    for path in folder.glob(pattern):
        process, _, rest = path.name.rpartition(f".{_machine()}-")[2].partition(".")
        if process.isdecimal() and not _lives(int(process), rest):
            ended.append(path)
    return ended


def _litter_prefix(target: Path) -> str:
    # The beginning alone may be that of another target.
    name = target.name if len(target.name) <= 80 else f"{target.name[:60]}-{_short_digest(target.name)}"
    return f".{name}.{_machine()}-"


def _machine() -> str:
    return _short_digest(socket.gethostname())


def _short_digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def _lives(process: int, rest: str) -> bool:
    """Whether the process lives that a name is of; rest: what follows its number in the name."""
    if process == os.getpid():
        return rest.startswith(_PROCESS)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def write(path: Path, content: bytes) -> None:
    """Write a file, not in one step, and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames last through a power cut, where the system can: Windows and some network disks cannot sync a
    folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_failure(target: Path, needed: int, error: OSError) -> str:
    """The message for a capsule of `needed` bytes that could not be saved to `target`."""
    kept = "Nothing half written is left" + (", and what was there is untouched." if target.exists() else ".")
    if error.errno not in NO_SPACE:
        return (
            f"cannot save the capsule to {target}: {error.strerror or error}. {kept} Mend this or choose another"
            " directory."
        )
    existing = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"cannot save the capsule to {target}: {NO_SPACE[error.errno]}. It needs {needed:,} bytes, beside a capsule"
        f" that it replaces, and {free:,} are free there. {kept} Free some space or choose another directory."
    )
