"""Results as whole files or none."""

import os
from pathlib import Path

from kvcapsule.cli.errors import InputError
from kvcapsule.files import unique_name, write


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename.

    Raises:
        InputError: if the file cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(unique_name(path))
    try:
        try:
            write(temporary, content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error
