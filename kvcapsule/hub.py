"""A capsule's files: save, load, push. checkpoints/FORMAT.md describes them for those who read or write them with other tools.

All five files are made in memory before the first byte is written, so their size is known and a bad recipe or metric costs nothing.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from . import __version__, files
from .capsule import FORMAT_VERSION, Capsule, CapsuleConfig, CapsuleError
from .card import CARD_LOADS, CARD_MEASURED, LIBRARY, MEASURED_TITLE, measured_section, model_card

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, RECIPE_FILE, METRICS_FILE)
"""What a capsule directory holds, and all that it holds."""
NEEDED_TO_LOAD = (CONFIG_FILE, WEIGHTS_FILE)
WEIGHTS_METADATA = {"format": "kvcapsule", "format_version": str(FORMAT_VERSION)}
"""The metadata of model.safetensors."""
MAIN_BRANCH = "main"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
LFS_POINTER = b"version https://git-lfs"
DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (HFValidationError, *(e for e in HfHubHTTPError.__bases__ if issubclass(e, Exception)))
UPLOAD_ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, *DOWNLOAD_ERRORS)


def save(
    capsule: Capsule,
    directory: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    card_name: str | None = None,
) -> None:
    """Write a capsule directory; a capsule that is there already is replaced only once the new one is wholly on the disk.

    Args:
        capsule: what to save.
        directory: a new or empty directory, or one that holds a capsule and nothing else.
        recipe: how the capsule was trained, in types that YAML knows.
        metrics: {"train": {name: number}, "eval": {"rows": [...]}}, see checkpoints/FORMAT.md.
        card_name: the name that the model card gives to `from_pretrained`; by default the directory's.

    Raises:
        CapsuleError: if the directory holds anything else, cannot be written, or the disk is full. Nothing half written is left, and what
            was in the directory is untouched.
        TypeError: if recipe or metrics hold objects that no text file can.
    """
    target = Path(directory).expanduser().resolve()
    contents = _contents(capsule, recipe, metrics, card_name or target.name)
    try:
        require_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.replace_folder(target, contents)
    except OSError as error:
        raise CapsuleError(files.write_failure(target, sum(map(len, contents.values())), error)) from error


def update_metrics(directory: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Put measurements into a saved capsule: into metrics.json, key by key, and into the card's section "Measured".

    Args:
        directory: a capsule directory.
        metrics: see `save`; a key that it lacks ("train", "eval") stays as it is.

    Raises:
        CapsuleError: if the directory is no capsule, its metrics.json is damaged, or the files cannot be written.
        TypeError: if metrics holds objects that no text file can.
    """
    folder, plain = Path(directory).expanduser().resolve(), files.plain(metrics, "metrics")
    _require_files(folder, FILES)
    path = folder / METRICS_FILE
    try:
        merged = {**json.loads(path.read_bytes()), **plain}
    except (TypeError, ValueError) as error:
        raise CapsuleError(f"{path} is damaged, so nothing was put into it ({error}): replace its content by {{}}.") from error
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    loads = CARD_LOADS.search(card)
    section = f"{MEASURED_TITLE}\n\n{measured_section(merged, loads['name'] if loads else folder.name)}\n\n"
    contents = {METRICS_FILE: files.to_json(merged), CARD_FILE: CARD_MEASURED.sub(lambda _: section, card).encode()}
    unique = files.unique_name(folder)
    partials = {name: folder.with_name(f"{unique}.{name}.partial") for name in contents}
    try:
        try:
            for name, content in contents.items():
                files.write(partials[name], content)
            for name, partial in partials.items():
                partial.replace(folder / name)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise CapsuleError(files.write_failure(folder, sum(map(len, contents.values())), error)) from error


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
        _require_files(folder, [CONFIG_FILE])
        return _config(folder)
    with _hub_errors(str(name), revision):
        path = hf_hub_download(str(name), CONFIG_FILE, revision=revision, library_name=LIBRARY, library_version=__version__)
    return _config(Path(path).parent)


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
        with _hub_errors(str(name), revision):
            patterns = list(FILES)
            folder = Path(
                snapshot_download(str(name), revision=revision, allow_patterns=patterns, library_name=LIBRARY, library_version=__version__)
            )
        _require_files(folder, NEEDED_TO_LOAD, repository=str(name))
    else:
        _require_files(folder, NEEDED_TO_LOAD)
    config = _config(folder)
    try:
        capsule = Capsule(config)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CapsuleError(
            f"{folder / CONFIG_FILE}: a {config.family} codec of these sizes cannot be built for {config.geometry.layers} layers of "
            f"{config.geometry.kv_heads} KV heads ({error}). The file is damaged or was changed by hand."
        ) from error
    tensors = _weights(folder / WEIGHTS_FILE)
    _require_tensors(folder / WEIGHTS_FILE, tensors, capsule.state_dict())
    # assign keeps the dtypes of the file; a copy would turn a bfloat16 capsule into a float32 one.
    capsule.load_state_dict(tensors, assign=True)
    return capsule.to(device).eval().requires_grad_(False)


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
        uploads.update(_contents(capsule_or_directory, recipe, metrics, repo_id))
    else:
        if recipe is not None or metrics is not None:
            raise CapsuleError("recipe and metrics go with a Capsule; a directory has its own recipe.yaml and metrics.json.")
        folder = _local(capsule_or_directory, None)
        if folder is None:
            raise CapsuleError(f"there is no directory {os.fspath(capsule_or_directory)!r} to push: train or save a capsule first.")
        _require_files(folder, FILES)
        load(folder)  # What cannot be loaded is not uploaded.
        uploads.update({name: folder / name for name in FILES})
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        uploads[CARD_FILE] = CARD_LOADS.sub(lambda _: f'Capsule.from_pretrained("{repo_id}")', card).encode()
    with _push_errors(repo_id):
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


def _contents(capsule: Capsule, recipe: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, name: str) -> dict[str, bytes]:
    """The five files."""
    plain_recipe, plain_metrics = files.plain(recipe or {}, "recipe"), files.plain(metrics or {}, "metrics")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in capsule.state_dict().items()}
    return {
        CONFIG_FILE: files.to_json(files.plain(capsule.config.to_dict(), "config")),
        WEIGHTS_FILE: safetensors_bytes(tensors, WEIGHTS_METADATA),
        CARD_FILE: model_card(capsule.config, plain_recipe, plain_metrics, name).encode(),
        RECIPE_FILE: files.to_yaml(plain_recipe).encode(),
        METRICS_FILE: files.to_json(plain_metrics),
    }


def require_replaceable(target: Path) -> None:
    """Raises CapsuleError if saving to `target` would delete what no capsule holds."""
    if target.exists() and not target.is_dir():
        raise CapsuleError(f"{target} is a file: name a directory to save the capsule in.")
    entries = sorted(os.listdir(target)) if target.exists() else []
    others = [entry for entry in entries if entry not in FILES]
    if others or (entries and not _holds_capsule(target)):
        found = others or entries
        listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise CapsuleError(
            f"{target} is not empty and not a capsule directory (it holds {listed}): a capsule saved there would replace all that. "
            "Choose a new or an empty directory."
        )


def _holds_capsule(folder: Path) -> bool:
    """Whether the folder's config.json is a capsule's, of any format version."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(values, dict) and {"format_version", "family"} <= values.keys()


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


def _require_files(folder: Path, names: Iterable[str], repository: str | None = None) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    if repository is None:
        raise CapsuleError(
            f"{folder} is not a capsule directory: it lacks {', '.join(missing)}. "
            "Name a directory that `kvcapsule train` or Capsule.save_pretrained wrote."
        )
    if constants.HF_HUB_OFFLINE:
        raise CapsuleError(
            f"{repository} is only in part in this machine's cache ({folder} lacks {', '.join(missing)}), and offline mode is on: "
            "unset HF_HUB_OFFLINE and load it once with a connection."
        )
    raise CapsuleError(
        f"the repository {repository} on the Hub is not a capsule, or only a part of it was ever downloaded: {', '.join(missing)} missing. "
        "Check the name, and the connection."
    )


def _config(folder: Path) -> CapsuleConfig:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CapsuleError(f"{path} is not JSON ({error}): the file is damaged. Save, copy or download the capsule again.") from error
    if not isinstance(values, dict) or "format_version" not in values:
        model = f" but the model_type {values['model_type']!r} of a model" if isinstance(values, dict) and "model_type" in values else ""
        raise CapsuleError(f"{path} is not the config of a capsule: it has no format_version{model}. Name a capsule.")
    try:
        return CapsuleConfig.from_dict(values)
    except CapsuleError as error:
        raise CapsuleError(f"{path}: {error}") from error
    except (AttributeError, TypeError) as error:
        raise CapsuleError(f"{path}: a value has the wrong type ({error}); the file is damaged or was changed by hand.") from error


def _weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: tensors that stay mapped to the file would change, or crash the process, when another program rewrites it in place.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CapsuleError(f"{path} cannot be read ({error}): {_diagnosis(path)}") from error
    for key, expected in WEIGHTS_METADATA.items():
        if metadata.get(key) != expected:
            raise CapsuleError(
                f"{path} has {key} {metadata.get(key)!r} in its metadata; this version of kvcapsule reads {expected!r}. "
                "The file is not a capsule's, or a newer kvcapsule wrote it."
            )
    return tensors


def _diagnosis(path: Path) -> str:
    """What is wrong with a file that is no sound safetensors, as far as its size and its header tell."""
    again = "Save, copy or download the capsule again."
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        if (start + file.read(len(LFS_POINTER) - len(start))) == LFS_POINTER:
            return "it is a pointer of Git LFS, not the weights. Run `git lfs pull` in the repository."
        file.seek(len(start))
        header_end = 8 + int.from_bytes(start, "little")
        if len(start) == 8 and header_end <= size:
            header = json.loads(file.read(header_end - 8))
            expected = header_end + max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            if size != expected:
                return f"it has {size:,} bytes where its header announces {expected:,}, so it was cut off or overwritten. {again}"
        return f"its {size:,} bytes are no safetensors file, or only the beginning of one. {again}"
    return f"it is no sound safetensors file. {again}"


def _require_tensors(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises CapsuleError naming every tensor that is missing, unexpected, or of another shape or kind of number."""
    faults = [f"{key} is missing" for key in expected if key not in found]
    faults += [f"{key} is unexpected" for key in sorted(found) if key not in expected]
    for key in expected.keys() & found.keys():
        have, want = found[key], expected[key]
        if have.shape != want.shape:
            faults.append(f"{key} has the shape {tuple(have.shape)} and not {tuple(want.shape)}")
        elif have.dtype != want.dtype and not (have.is_floating_point() and want.is_floating_point()):
            faults.append(f"{key} holds {have.dtype} and not {want.dtype}")
    if faults:
        listed = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CapsuleError(f"{path} does not hold the tensors that {CONFIG_FILE} asks for: {listed}. The two are of different capsules.")


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises while it downloads into a CapsuleError that says what to do."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except GatedRepoError as error:
        raise CapsuleError(
            f"{name} is gated: ask for access at {constants.ENDPOINT}/{name}, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise CapsuleError(
            f"no capsule {name!r}: there is no such directory here, no shipped capsule of that name, and no such repository on the Hub "
            f"({constants.ENDPOINT}) that you can see. Check the name; if it is private, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise CapsuleError(f"the repository {name} on the Hub has no revision {revision!r}: give a branch, tag or commit of it.") from error
    except LocalEntryNotFoundError as error:
        cause = f"the Hub ({constants.ENDPOINT}) gave no usable answer ({_one_line(error.__cause__ or error)})"
        reason = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else cause
        raise CapsuleError(
            f"no capsule {name!r}{at}: there is no such directory here, it is not wholly in this machine's cache, and {reason}. "
            "Load it once with a connection, or name a directory."
        ) from error
    except EntryNotFoundError as error:
        raise CapsuleError(f"the repository {name} on the Hub is not a capsule{at}: it has no {CONFIG_FILE}.") from error
    except DOWNLOAD_ERRORS as error:
        raise CapsuleError(f"cannot download {name}{at} from the Hub ({constants.ENDPOINT}): {_one_line(error)}") from error


@contextmanager
def _push_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises while it uploads into a CapsuleError that says what to do."""
    try:
        yield
    except CapsuleError:
        raise
    except LocalTokenNotFoundError as error:
        raise CapsuleError(f"cannot push to {repo_id}: you are not logged in. Run `hf auth login` or set HF_TOKEN.") from error
    except UPLOAD_ERRORS as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise CapsuleError(
                f"cannot push to {repo_id}: the Hub ({constants.ENDPOINT}) does not let you write there (HTTP {status}). "
                "Log in with `hf auth login` or set HF_TOKEN, with a token that may write to this organisation or user."
            ) from error
        raise CapsuleError(f"cannot push to {repo_id} on the Hub ({constants.ENDPOINT}): {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
