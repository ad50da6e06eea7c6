"""How every command ends: with its own exit code, or with one line on stderr where its input, its place or the machine
fails it.

A command raises KVCapsuleError for what it expects to go wrong. What may go wrong anywhere is said here, once for all
commands: files and folders that cannot be used, text that cannot be encoded, memory that is used up, nesting without
end, readers of a pipe that go away, Ctrl-C. Any other exception is a defect and keeps its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable

from ..atomic_files import NO_SPACE
from ..errors import KVCapsuleError
from .errors import CLOSED_PIPE, INTERRUPTED, complain
from .streams import discard, fails

TRACEBACK = "KVCAPSULE_TRACEBACK"
"""The environment variable with which errors of the place or the machine keep their traceback."""
_MEND = {
    **dict.fromkeys(NO_SPACE, "free some space, or name another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend the permissions, or name another place"),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
}
_OUT_OF_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator")
"""What PyTorch's errors are called, or say, when memory is used up: a class of CUDA's, and a RuntimeError on CPUs."""
_HOMELESS = "Could not determine home directory"
"""What Python says of `~` where there is no such home."""
_NULL = ("embedded null byte", "embedded null character")
"""What Python says of names that hold a null character."""


def run_to_end(prog: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit code: 2 for what it, its place or the machine refuses, 130 for an interrupt,
    141 where the reader of a pipe is gone.

    Args:
        prog: name of the command, for the line on stderr.
        command: to be run; its exit code, or SystemExit, goes on.
    """
    try:
        try:
            return command()
        finally:
            # What cannot be written is an error of this command: Python would report it at exit.
            sys.stdout.flush()
    except KVCapsuleError as error:
        return complain(prog, error)
    except BrokenPipeError:
        discard(sys.stdout)
        return CLOSED_PIPE
    except KeyboardInterrupt:
        # A terminal has just written ^C into the present line.
        print("\n" if sys.stderr.isatty() else "", f"{prog}: interrupted.", sep="", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = _line(error)
        if line is None or os.environ.get(TRACEBACK):
            raise
        return complain(prog, line)


def _line(error: Exception) -> str | None:
    """What to tell a person of an error that is no defect; None of others."""
    if isinstance(error, OSError):
        return _line_of_file(error)
    if isinstance(error, UnicodeEncodeError):
        return (
            f"{error.object[error.start : error.end][:20]!a} cannot be written in {error.encoding}: leave it out,"
            " or set a locale with UTF-8 (LC_ALL=C.UTF-8)."
        )
    if isinstance(error, UnicodeDecodeError):
        return f"a file that was read is no text in UTF-8 ({error.reason} at byte {error.start:,}): save it in UTF-8."
    if isinstance(error, RecursionError):
        return f"an input is nested too deep to be read; where, a traceback shows with {TRACEBACK}=1."
    if isinstance(error, MemoryError) or any(word in f"{type(error)} {error}" for word in _OUT_OF_MEMORY):
        return "memory is used up: take less at once, such as fewer or smaller images, a smaller batch or model."
    if isinstance(error, RuntimeError) and str(error).startswith(_HOMELESS):
        return "a name begins with ~ and the home directory is not known: write the whole path."
    if isinstance(error, ValueError) and str(error) in _NULL:
        return "the name of a file holds a null character: write it without."
    return None


def _line_of_file(error: OSError) -> str:
    code = error.errno or 0
    reason = NO_SPACE.get(code) or error.strerror or " ".join(str(error).split()) or type(error).__name__
    mend = _MEND.get(code, "mend this, or name another place")
    if error.filename is not None:
        # The second is the target of a rename.
        names = (name for name in (error.filename, error.filename2) if name is not None)
        what = " or ".join(os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names)
        return f"{what} cannot be used: {reason}. Please {mend}."
    if fails(sys.stdout):
        discard(sys.stdout)
        return f"standard output cannot be written: {reason}. Please {mend}."
    what = "standard output or a file cannot be written" if code in NO_SPACE else "a file or connection cannot be used"
    return f"{what}: {reason}. Please {mend}; {TRACEBACK}=1 shows where."
