"""A capsule's folder by its name: an existing one, put back if a save to it was killed, or one to write."""

import os
from pathlib import Path

from ..atomic_files import put_back
from ..errors import CapsuleError, shortened

_LONGEST_NAME = 4096


def existing_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of that name, `~` expanded; None if there is none, or no file could be called so.

    One that a killed save left beside its place is put back.

    Raises:
        CapsuleError: if it is a file, or cannot be put back.
    """
    folder = _expanded(os.fspath(name))
    if folder is None:
        return None
    restore(folder)
    if not os.path.exists(folder):
        return None
    if not os.path.isdir(folder):
        raise CapsuleError(f"{folder} is a file: name the capsule's directory.")
    return folder


def restore(folder: Path) -> None:
    """Put back the capsule that a killed save left beside this place, if it did.

    Raises:
        CapsuleError: if it cannot be renamed.
    """
    try:
        place = Path(os.path.realpath(folder))
    except PermissionError:  # Behind what this user may not look at, nothing was left by one of its saves.
        return
    try:
        put_back(place)
    except OSError as error:
        raise CapsuleError(
            f"a save to {folder} was killed, and the capsule that it left in {place.parent} cannot be renamed"
            f" ({error.strerror or error}): make that directory writable."
        ) from error


def new_folder(name: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to write, `~` expanded.

    Raises:
        CapsuleError: if no folder could be called so.
    """
    text = os.fspath(name)
    folder = _expanded(text)
    if folder is None:
        raise CapsuleError(f"{shortened(text)!r} cannot name a directory: choose another name.")
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CapsuleError(f"{shortened(text)!r} cannot name a directory ({error}): choose another name.") from error


def _expanded(text: str) -> Path | None:
    try:
        text.encode()
        folder = Path(text).expanduser()
    except (RuntimeError, UnicodeEncodeError):
        return None
    return None if "\0" in text or len(text) > _LONGEST_NAME else folder
