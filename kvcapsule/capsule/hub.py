"""A capsule by its name: loaded from a directory, from those that are shipped or from the Hub, and pushed there.

`folder` reads the files, `saving` writes them; what others need of both is here too.
"""

import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download

from .. import __version__
from .capsule import Capsule, CapsuleConfig, CapsuleError
from .card import CARD_LOADS, LIBRARY
from .hub_errors import download_errors, upload_errors
from .read import (
    CARD_FILE,
    CONFIG_FILE,
    FILES,
    METRICS_FILE,
    NEEDED_TO_LOAD,
    RECIPE_FILE,
    WEIGHTS_FILE,
    WEIGHTS_METADATA,
    capsule_in,
    config_in,
    missing_files,
    require_files,
)
from .write import contents_of, require_replaceable, save, update_metrics

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "FILES",
    "METRICS_FILE",
    "NEEDED_TO_LOAD",
    "RECIPE_FILE",
    "WEIGHTS_FILE",
    "WEIGHTS_METADATA",
    "load",
    "push",
    "read_config",
    "require_replaceable",
    "save",
    "update_metrics",
]

MAIN_BRANCH = "main"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def read_config(name: str | os.PathLike[str], revision: str | None = None) -> CapsuleConfig:
    """The config of a capsule, without its weights; from the Hub, config.json is all that is downloaded.

    Args:
        name: a directory, a shipped name or a Hub id; see `load`.
        revision: branch, tag or commit on the Hub.

    Raises:
        CapsuleError: if there is no such capsule, or its config is damaged or of another format version.
    """
    folder = _local(name, revision)
    if folder is not None:
        require_files(folder, [CONFIG_FILE])
        return config_in(folder)
    with download_errors(str(name), revision):
        path = hf_hub_download(str(name), CONFIG_FILE, revision=revision, library_name=LIBRARY, library_version=__version__)
    return config_in(Path(path).parent)


def load(name: str | os.PathLike[str], revision: str | None = None, device: torch.device | str = "cpu") -> Capsule:
    """A capsule in eval mode, frozen, with the dtypes that it was saved in.

    Args:
        name: a directory; else the name of a shipped capsule; else a Hub id, "organisation/name".
        revision: branch, tag or commit on the Hub.
        device: where to put the codecs.

    Raises:
        CapsuleError: if there is no such capsule, it cannot be downloaded, a file is missing, damaged or of another format version, or the
            tensors are not those that the config asks for.
    """
    folder = _local(name, revision)
    if folder is None:
        with download_errors(str(name), revision):
            patterns = list(FILES)
            folder = Path(
                snapshot_download(str(name), revision=revision, allow_patterns=patterns, library_name=LIBRARY, library_version=__version__)
            )
        _require_downloaded(folder, str(name))
    else:
        require_files(folder, NEEDED_TO_LOAD)
    return capsule_in(folder, device)


def push(
    capsule_or_directory: Capsule | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload capsule",
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Upload a capsule to the Hub in one commit, creating the repository and the branch where they do not exist.

    Of a directory's files only the model card is changed on the way: its snippet loads `repo_id`.

    Args:
        capsule_or_directory: a directory goes up with its recipe, metrics and card; a Capsule knows none of these, so give them here.
        repo_id: "organisation/name" or "user/name".
        private: create the repository as private; a public one is refused. False leaves it to the account's default.
        revision: branch to push to; by default main.
        token: by default that of `hf auth login` or HF_TOKEN.
        commit_message: the commit's subject.
        recipe: see `save`; for a Capsule only.
        metrics: see `save`; for a Capsule only.

    Returns:
        The address of what was pushed.

    Raises:
        CapsuleError: if the directory is no sound capsule, the repository's name or visibility is wrong, or the Hub refuses.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise CapsuleError(f"{repo_id!r} is no name of a repository on the Hub: write organisation/name or user/name.")
    uploads: dict[str, bytes | Path] = {}
    if isinstance(capsule_or_directory, Capsule):
        uploads.update(contents_of(capsule_or_directory, recipe, metrics, repo_id))
    else:
        if recipe is not None or metrics is not None:
            raise CapsuleError("recipe and metrics go with a Capsule; a directory has its own recipe.yaml and metrics.json.")
        folder = _local(capsule_or_directory, None)
        if folder is None:
            raise CapsuleError(f"there is no directory {os.fspath(capsule_or_directory)!r} to push: train or save a capsule first.")
        require_files(folder, FILES)
        load(folder)  # What cannot be loaded is not uploaded.
        uploads.update({name: folder / name for name in FILES})
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        uploads[CARD_FILE] = CARD_LOADS.sub(lambda _: f'Capsule.from_pretrained("{repo_id}")', card).encode()
    with upload_errors(repo_id):
        api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise CapsuleError(
                f"nothing was pushed: {repo_id} exists already and is public. Make it private on the Hub, choose another name, "
                "or leave out private."
            )
        if revision is not None and revision != MAIN_BRANCH and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in uploads.items()]
        api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    return f"{url}/tree/{revision}" if revision else str(url)


def _local(name: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The directory that `name` means, by its path or as a shipped name; None if it can only be a Hub id."""
    text = os.fspath(name)
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CapsuleError(f"{folder} is a file: name the capsule's directory, which holds {', '.join(FILES)}.")
    # Imported by name: an installation maps the folder checkpoints/ into the package, which type checkers cannot see.
    checkpoints = import_module("kvcapsule.checkpoints")
    found: Path | None = folder if text and folder.is_dir() else checkpoints.shipped(text)
    if found is not None:
        if revision is not None:
            raise CapsuleError(
                f"revision {revision!r} was given, but {text!r} is a directory ({found}): only repositories on the Hub have revisions."
            )
        return found
    if isinstance(name, str) and HUB_ID.fullmatch(name):
        return None
    raise CapsuleError(
        f"no capsule {text!r}: there is no directory {folder.absolute()}, no shipped capsule of that name (shipped: "
        f"{', '.join(checkpoints.shipped_names()) or 'none'}), and a name on the Hub has the form organisation/name."
    )


def _require_downloaded(folder: Path, repository: str) -> None:
    """Raises CapsuleError if the snapshot of a repository lacks what loading needs."""
    missing = missing_files(folder, NEEDED_TO_LOAD)
    if not missing:
        return
    if constants.HF_HUB_OFFLINE:
        raise CapsuleError(
            f"{repository} is only in part in this machine's cache ({folder} lacks {', '.join(missing)}), and offline mode is on: "
            "unset HF_HUB_OFFLINE and load it once with a connection."
        )
    raise CapsuleError(
        f"the repository {repository} on the Hub is not a capsule, or only a part of it was ever downloaded: {', '.join(missing)} missing. "
        "Check the name, and the connection."
    )
