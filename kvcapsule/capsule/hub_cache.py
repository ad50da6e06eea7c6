"""The cache of the Hub's client, whose files are named by their digest, which the client itself does not check again:
one that was damaged on disk it would give out for ever."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import constants

from ..errors import CapsuleError

_SHA256, _GIT_SHA1 = 64, 40
"""Digits of the two kinds of names: those of LFS files, and of the files in git itself."""
_logger = logging.getLogger(__name__)


def damaged_files(folder: Path, names: Sequence[str]) -> list[str]:
    """The files of a snapshot whose content is not what their name in the cache says; files that are no links into the
    cache (as on Windows) are not known to be."""
    return [name for name in names if (folder / name).is_symlink() and not _is_intact((folder / name).resolve())]


def mended(name: str, folder: Path, names: Sequence[str], download: Callable[[str, list[str]], Path]) -> Path:
    """The folder of a snapshot, its damaged files downloaded again.

    Args:
        name: the repository.
        folder: of the snapshot, which is called after its commit.
        names: its files that are checked.
        download: downloads files of a commit anew, whatever the cache holds, and gives their folder.

    Raises:
        CapsuleError: if they cannot be downloaded, or are damaged still.
    """
    damaged = damaged_files(folder, names)
    if not damaged:
        return folder
    listed = ", ".join(damaged)
    if constants.HF_HUB_OFFLINE:
        raise CapsuleError(
            f"{listed} of {name} is damaged in this machine's cache ({folder}), and offline mode is on: unset"
            " HF_HUB_OFFLINE and load it once with a connection, which downloads it again."
        )
    _logger.warning("kvcapsule: %s of %s is damaged in this machine's cache, and is downloaded again.", listed, name)
    folder = download(folder.name, damaged)
    if damaged_files(folder, names):
        raise CapsuleError(
            f"{listed} of {name} is damaged in this machine's cache ({folder}), and could not be downloaded again:"
            " check the connection and the disk, or delete that folder."
        )
    return folder


def _is_intact(blob: Path) -> bool:
    """Whether a file of the cache has the digest that it is named by. One with another kind of name is taken as it
    is."""
    try:
        if len(blob.name) not in (_SHA256, _GIT_SHA1):
            return True
        digest = hashlib.sha256()
        with blob.open("rb") as file:
            if len(blob.name) == _GIT_SHA1:
                digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        raise CapsuleError(f"{blob} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest() == blob.name
