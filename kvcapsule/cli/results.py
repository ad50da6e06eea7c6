"""Writing the results of commands: --json, checks that files can be written, atomic writes, and names without this
machine's paths."""

import json
import os
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ..atomic_files import NO_SPACE, replacing, to_json
from ..errors import InputError

_ROOM = 4096
"""Bytes of a small result."""
STDOUT = "-"
"""What `--json` is given to print the JSON in place of the tables."""


def add_json_option(parser: ArgumentParser) -> None:
    """The option --json of a command that prints a table."""
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE as JSON; - prints it instead")


def add_wide_option(parser: ArgumentParser) -> None:
    """The option --wide of a command whose table has more columns than it shows by default."""
    parser.add_argument("--wide", action="store_true", help="show all columns of the table")


def write_json(target: str | None, value: Any) -> None:
    """Write a result where --json says: to a file, to stdout (-), or nowhere (None).

    Raises:
        InputError: if the file cannot be written.
    """
    if target == STDOUT:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Not every encoding has every character of JSON; all have those of its escapes.
        exact = encoding.lower().startswith("utf")
        sys.stdout.write(to_json(value).decode() if exact else json.dumps(value, indent=2, allow_nan=False) + "\n")
    elif target is not None:
        write_whole(Path(target), to_json(value))


def json_file(target: str | None) -> str | None:
    """The file of --json for a report to link to, None where the JSON is printed or not wanted."""
    return None if target == STDOUT else target


def require_writable(files: Iterable[str | None], folders: Iterable[str | None] = ()) -> None:
    """Create the folders of the results before the run, so that no result is lost. None stands for no file, - for
    stdout.

    Raises:
        InputError: if a file or folder cannot be written.
    """
    wanted = [expanded(file) for file in files if file is not None and file != STDOUT]
    regular = [file for file in wanted if not _is_device(file)]
    for folder in [*(file.parent for file in regular), *(expanded(folder) for folder in folders if folder is not None)]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Whether it can be written: permissions say less of a superuser or of a network disk, and nothing of a full
            # one.
            with TemporaryFile(dir=folder) as tried:
                tried.write(bytes(_ROOM))
        except OSError as error:
            reason = NO_SPACE.get(error.errno or 0) or error.strerror or error
            raise InputError(f"{folder} cannot be written to: {reason}.") from error
    for file in wanted:
        if file.is_dir():
            raise InputError(f"{file} is a folder: name a file.")


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename; what is no file but a device or a pipe, such as /dev/null, is written
    as it is.

    Raises:
        InputError: if the file cannot be written; what was there before is untouched.
    """
    path = expanded(path)
    try:
        if _is_device(path):
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        reason = NO_SPACE.get(error.errno or 0) or error.strerror or error
        raise InputError(f"{path} cannot be written: {reason}.") from error


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path with the home directory for `~`, which shells leave in words such as --json=~/x; as it stands if there is
    no such home."""
    return Path(os.path.expanduser(name))


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def shown_path(name: str) -> str:
    """A name as a report shows it: an absolute path becomes relative to the working directory, or its last part."""
    path = expanded(name)
    if not path.is_absolute():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def command_line(prog: str, words: Sequence[str]) -> str:
    """A command line as a report shows it, its paths by `shown_path`."""
    shown = []
    for word in words:
        name, equals, value = word.partition("=")
        shown.append(f"{name}={shown_path(value)}" if equals and name.startswith("--") else shown_path(word))
    return shlex.join([*prog.split(), *shown])
