"""What commands that write results have in common: places that can be written to, whole files, and names without a
machine's paths."""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..atomic_files import unique_name, write
from ..errors import InputError


def require_writable(files: Iterable[str | None], folders: Iterable[str | None] = ()) -> None:
    """Make the folders of the results now: a result that has nowhere to go costs the whole run. None stands for what is
    not wanted.

    Raises:
        InputError: if a file or folder cannot be written.
    """
    wanted = [Path(file) for file in files if file is not None]
    for folder in [*(file.parent for file in wanted), *(Path(folder) for folder in folders if folder is not None)]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be written to: {error.strerror or error}.") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{folder} cannot be written to: it is read-only.")
    for file in wanted:
        if file.is_dir():
            raise InputError(f"{file} is a folder: name a file.")


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename.

    Raises:
        InputError: if the file cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(unique_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary, content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error


def shown_path(name: str) -> str:
    """A name as a report may show it: where it is an absolute path, relative to the working directory, or else its last
    part."""
    path = Path(name).expanduser()
    if not path.is_absolute():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def command_line(prog: str, words: Sequence[str]) -> str:
    """A command line, without the places of absolute paths."""
    shown = []
    for word in words:
        name, equals, value = word.partition("=")
        shown.append(f"{name}={shown_path(value)}" if equals and name.startswith("--") else shown_path(word))
    return shlex.join([*prog.split(), *shown])
