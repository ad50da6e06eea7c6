"""Capsule lookup by name (directory, shipped name or Hub id), and download and upload of its files."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download

from .._version import __version__
from ..errors import CapsuleError, shortened
from .capsule_folder import existing_folder
from .card import LIBRARY
from .config import CapsuleConfig
from .hub_cache import mended
from .hub_errors import download_errors, upload_errors
from .read import (
    CONFIG_FILE,
    FILES,
    NEEDED_TO_LOAD,
    OPTIONAL_FILES,
    config_in,
    missing_files,
    require_files,
)

MAIN_BRANCH = "main"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def read_config(name: str | os.PathLike[str], revision: str | None = None) -> CapsuleConfig:
    """Read the config of a capsule without its weights; from the Hub only config.json is downloaded.

    Args:
        name: a directory, a shipped name or a Hub id; see `find`.
        revision: branch, tag or commit on the Hub.

    Raises:
        CapsuleError: if there is no such capsule, or its config is damaged or of another format version.
    """
    folder = local_folder(name, revision)
    if folder is not None:
        require_files(folder, [CONFIG_FILE])
        return config_in(folder)
    with download_errors(str(name), revision):
        path = hf_hub_download(
            str(name), CONFIG_FILE, revision=revision, library_name=LIBRARY, library_version=__version__
        )
        return config_in(mended(str(name), Path(path).parent, [CONFIG_FILE], partial(_downloaded_anew, str(name))))


def find(name: str | os.PathLike[str], revision: str | None = None, force_download: bool = False) -> Path:
    """Find the folder of a capsule, downloading it from the Hub if need be; it has all files that loading needs.

    Files that are damaged in the cache of the Hub's client are downloaded again.

    Args:
        name: a directory; else the name of a shipped capsule; else a Hub id, "organisation/name".
        revision: branch, tag or commit on the Hub.
        force_download: download all files, whatever the cache holds.

    Raises:
        CapsuleError: if there is no such capsule, it cannot be downloaded, or a file is missing.
    """
    folder = local_folder(name, revision)
    if folder is not None:
        if force_download:
            raise CapsuleError(f"force_download was given, but {os.fspath(name)!r} is a directory ({folder}).")
        require_files(folder, NEEDED_TO_LOAD)
        return folder
    with download_errors(str(name), revision):
        folder = _downloaded(str(name), revision, [*FILES, *OPTIONAL_FILES], force_download)
        _require_downloaded(folder, str(name))
        return mended(str(name), folder, [*FILES, *OPTIONAL_FILES], partial(_downloaded_anew, str(name)))


def _downloaded(name: str, revision: str | None, patterns: list[str], force: bool) -> Path:
    """The folder of a snapshot with these files. Raises the exceptions of the Hub's client."""
    return Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            force_download=force,
            library_name=LIBRARY,
            library_version=__version__,
        )
    )


def _downloaded_anew(name: str, commit: str, patterns: list[str]) -> Path:
    return _downloaded(name, commit, patterns, True)


@dataclass(frozen=True)
class Destination:
    """Target repository of a push, and its options."""

    repo_id: str
    """"organisation/name" or "user/name"."""
    private: bool = False
    """Create the repository as private; an existing public one is refused. False: the account's default."""
    revision: str | None = None
    """Branch to push to; by default main."""
    token: str | None = None
    """Access token; by default that of `hf auth login` or HF_TOKEN."""
    commit_message: str = "Upload capsule"
    """Subject of the commit."""

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.repo_id):
            raise CapsuleError(
                f"{self.repo_id!r} is no name of a repository on the Hub: write organisation/name or user/name."
            )


def upload(contents: Mapping[str, bytes | Path], to: Destination) -> str:
    """Upload a capsule's files in one commit, creating the repository and the branch where they do not exist.

    Args:
        contents: content, or path of a local file, by file name.
        to: the repository.

    Returns:
        The URL of the pushed revision.

    Raises:
        CapsuleError: if the repository's visibility is wrong, or the Hub refuses.
    """
    with upload_errors(to.repo_id):
        api = HfApi(token=to.token, library_name=LIBRARY, library_version=__version__)
        url = api.create_repo(to.repo_id, private=to.private or None, exist_ok=True)
        if to.private and not api.model_info(to.repo_id).private:
            raise CapsuleError(
                f"nothing was pushed: {to.repo_id} exists already and is public. Make it private on the Hub, choose"
                " another name, or leave out private."
            )
        if to.revision is not None and to.revision != MAIN_BRANCH and not to.revision.startswith("refs/"):
            api.create_branch(to.repo_id, branch=to.revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(to.repo_id, operations, commit_message=to.commit_message, revision=to.revision)
    return f"{url}/tree/{to.revision}" if to.revision else str(url)


def local_folder(name: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The directory that `name` refers to, as a path or as a shipped name; None if it can only be a Hub id."""
    text = os.fspath(name)
    folder = existing_folder(text)
    # Imported by name: an installation maps the folder checkpoints/ into the package, which type checkers cannot see.
    checkpoints = import_module("kvcapsule.checkpoints")
    local: Path | None = folder if text and folder else checkpoints.shipped(text)
    if local is not None:
        if revision is not None:
            raise CapsuleError(
                f"revision {revision!r} was given, but {text!r} is a directory ({local}): only repositories on the Hub"
                " have revisions."
            )
        return local
    if isinstance(name, str) and HUB_ID.fullmatch(name):
        return None
    raise CapsuleError(
        f"no capsule {shortened(text)!r}: there is no directory {shortened(os.path.abspath(text))}, no shipped capsule"
        f" of that name (shipped: {', '.join(checkpoints.shipped_capsules()) or 'none'}), and a name on the Hub has the"
        " form organisation/name."
    )


def _require_downloaded(folder: Path, repository: str) -> None:
    """Raises CapsuleError if the snapshot of a repository lacks what loading needs."""
    missing = missing_files(folder, NEEDED_TO_LOAD)
    if not missing:
        return
    if constants.HF_HUB_OFFLINE:
        raise CapsuleError(
            f"{repository} is only in part in this machine's cache ({folder} lacks {', '.join(missing)}), and offline"
            " mode is on: unset HF_HUB_OFFLINE and load it once with a connection."
        )
    raise CapsuleError(
        f"the repository {repository} on the Hub is not a capsule, or only a part of it was ever downloaded:"
        f" {', '.join(missing)} missing. Check the name, and the connection."
    )
