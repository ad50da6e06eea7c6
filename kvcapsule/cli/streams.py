"""What a process is started with: its arguments, and its standard streams, which may be closed, may fail, or lack
characters."""

import os
import sys
from contextlib import suppress
from typing import Any

from ..errors import InputError

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
"""By their descriptors, 0 to 2."""


def prepare() -> None:
    """Make the standard streams of this process usable.

    Whatever is opened next would have the descriptor of a closed stream, and be written over by what prints there: its
    place is taken by the null device. A character that the encoding of stdout lacks is written as an escape.

    Raises:
        InputError: if stdout is closed, as what a command prints would be lost.
    """
    closed = [name for fd, (name, mode) in enumerate(_STREAMS) if _opened(fd, name, mode)]
    for stream in (sys.stdout, sys.stderr):
        # Streams of a program that calls a command may be of another class.
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")
    if "stdout" in closed:
        raise InputError("standard output is closed: redirect it to a file, or to /dev/null.")


def require_text(words: list[str]) -> None:
    """Refuse arguments that are no text in UTF-8: they could be neither encoded, nor shown, nor saved.

    Raises:
        InputError: naming the first.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the argument {word[:80]!a} is no text in UTF-8: write it in UTF-8, rename the file that it names, or"
                " set a locale with UTF-8 (LC_ALL=C.UTF-8)."
            ) from error


def fails(stream: Any) -> bool:
    """Whether a stream cannot be written."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


def discard(stream: Any) -> None:
    """Let what a stream still holds go nowhere: Python would report at exit that it cannot be written."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


def _opened(descriptor: int, name: str, mode: str) -> bool:
    """Open a standard stream on the null device if it is closed; returns whether it was."""
    if getattr(sys, name) is not None:
        return False
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
    setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))
    return True
