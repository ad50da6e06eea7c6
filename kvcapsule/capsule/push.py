"""Push of a capsule directory to the Hub, with its recipe, metrics and model card."""

import os
from pathlib import Path

from ..errors import CapsuleError
from .capsule import Capsule
from .card import renamed
from .hub import Destination, local_folder, upload
from .read import CARD_FILE, FILES, OPTIONAL_FILES, REPORT_FILE, card_in, require_files


def push_directory(directory: str | os.PathLike[str], to: Destination) -> str:
    """Upload a capsule directory in one commit and return its URL.

    Only the model card is changed: its code and its commands load the repository. A page of `kvcapsule report` that
    lies in the directory goes with it.

    Args:
        directory: a capsule directory, or the name of a shipped capsule.
        to: the repository.

    Raises:
        CapsuleError: if the directory is no sound capsule, the repository's visibility is wrong, or the Hub refuses.
    """
    folder = local_folder(directory, None)
    if folder is None:
        raise CapsuleError(f"there is no directory {os.fspath(directory)!r} to push: train or save a capsule first.")
    require_files(folder, FILES)
    Capsule.from_pretrained(folder)  # Refuses to upload a capsule that cannot be loaded.
    contents: dict[str, bytes | Path] = {name: folder / name for name in FILES}
    contents |= {name: folder / name for name in (*OPTIONAL_FILES, REPORT_FILE) if (folder / name).is_file()}
    contents[CARD_FILE] = renamed(card_in(folder), to.repo_id).encode()
    return upload(contents, to)
