"""Pushing a capsule's directory to the Hub, with the recipe, metrics and model card that it holds."""

import os
from pathlib import Path

from ..errors import CapsuleError
from .capsule import Capsule
from .card import CARD_LOADS
from .hub import Destination, local_folder, upload
from .read import CARD_FILE, FILES, require_files


def push_directory(directory: str | os.PathLike[str], to: Destination) -> str:
    """Upload a capsule directory in one commit and return its address.

    Only the model card is changed on the way: its snippet loads the repository.

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
    Capsule.from_pretrained(folder)  # What cannot be loaded is not uploaded.
    contents: dict[str, bytes | Path] = {name: folder / name for name in FILES}
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    contents[CARD_FILE] = CARD_LOADS.sub(lambda _: f'Capsule.from_pretrained("{to.repo_id}")', card).encode()
    return upload(contents, to)
