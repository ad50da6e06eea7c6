"""What is known of a capsule without loading its weights: its config, recipe, measurements and training rows.

For `kvcapsule show`, `kvcapsule list` and `kvcapsule report`. Files that a folder lacks count as empty.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ..checkpoints import shipped, shipped_capsules
from ..errors import CapsuleError, KVCapsuleError
from ..yaml_files import read_yaml
from . import hub
from .config import CapsuleConfig
from .limits import read_json
from .measured import evaluation_fault, training_fault
from .read import CONFIG_FILE, METRICS_FILE, NEEDED_TO_LOAD, RECIPE_FILE, WEIGHTS_FILE, config_in, missing_files
from .training_rows import TrainingRows

SHIPPED, ON_DISK, DOWNLOADED = "shipped", "disk", "hub"
"""Where a capsule lies: with kvcapsule, in a folder, in the cache of the Hub's client."""
_DEEPEST = 3
"""Folders between the one that is searched and a capsule, that one included."""
_NO_CAPSULES = ("node_modules", "site-packages", "__pycache__")


@dataclass(frozen=True)
class Overview:
    """A capsule's files but its weights."""

    name: str
    """As `Capsule.from_pretrained` takes it."""
    folder: Path
    config: CapsuleConfig
    metrics: dict[str, Any] = field(default_factory=dict)
    """"train": numbers by name; "eval": the object that docs/eval-json.md describes. Either may be missing."""
    recipe: dict[str, Any] = field(default_factory=dict)
    training_rows: TrainingRows | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file of the weights."""
        return (self.folder / WEIGHTS_FILE).stat().st_size

    @property
    def evaluation(self) -> dict[str, Any]:
        """The last evaluation that was saved with the capsule; empty: none."""
        return self.metrics.get("eval") or {}

    @property
    def training(self) -> dict[str, Any]:
        """What training measured at its end; empty: nothing is known."""
        return self.metrics.get("train") or {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The methods of the last evaluation."""
        return self.evaluation.get("rows") or []

    def is_of_this(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the evaluation is this capsule's."""
        name = (row.get("settings") or {}).get("capsule")
        alike = [other for other in self.rows if other.get("family") == self.config.family]
        return row in alike and (len(alike) == 1 or PurePath(str(name)).name == PurePath(self.name).name)

    @property
    def compression(self) -> float | None:
        """How many times fewer bytes than a 16-bit cache it stores of visual tokens; None where it was not measured."""
        measured = [row.get("compression16") for row in self.rows if self.is_of_this(row)]
        value = next((value for value in measured if value is not None), self.training.get("compression"))
        return float(value) if isinstance(value, int | float) else None


def overview(name: str | os.PathLike[str], revision: str | None = None) -> Overview:
    """What is known of a capsule.

    Args:
        name: a directory; else the name of a shipped capsule; else a Hub id, which is downloaded.
        revision: branch, tag or commit on the Hub.

    Raises:
        CapsuleError: if there is no such capsule, it cannot be downloaded, or a file is damaged.
    """
    return _of(os.fspath(name), hub.find(name, revision))


def capsules_here(folders: Sequence[Path]) -> Iterator[tuple[str, Overview | CapsuleError]]:
    """The capsules of this machine, or what is wrong with one: shipped ones, those below `folders`, and those in the
    cache of the Hub's client.

    Yields:
        SHIPPED, ON_DISK or DOWNLOADED, and what is known of a capsule.
    """
    shipped_folders = [(name, path) for name in shipped_capsules() if (path := shipped(name)) is not None]
    seen: set[Path] = set()
    places = [(SHIPPED, shipped_folders), (ON_DISK, _below(folders)), (DOWNLOADED, _downloaded())]
    for place, named in places:
        for name, folder in named:
            if (real := folder.resolve()) not in seen and _is_capsule(folder):
                seen.add(real)
                try:
                    yield place, _of(name, folder)
                except CapsuleError as error:
                    yield place, error


def _of(name: str, folder: Path) -> Overview:
    metrics = read_json(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else {}
    recipe = _recipe(folder / RECIPE_FILE) if (folder / RECIPE_FILE).is_file() else {}
    for file, values in ((METRICS_FILE, metrics), (RECIPE_FILE, recipe)):
        if not isinstance(values, dict):
            raise CapsuleError(f"{folder / file} holds no names and values: it is damaged; delete it.")
    # A key that is null or missing: nothing was measured.
    fault = training_fault(metrics.get("train") or {}) or evaluation_fault(metrics.get("eval") or {})
    if fault is not None:
        raise CapsuleError(f"{folder / METRICS_FILE} is damaged ({fault}): delete it, and measure again.")
    return Overview(name, folder, config_in(folder), metrics, recipe, TrainingRows.in_folder(folder))


def _recipe(path: Path) -> Any:
    try:
        return read_yaml(path) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CapsuleError(
            f"{path} cannot be read ({' '.join(str(error).split())}): it is damaged; delete it."
        ) from error


def _is_capsule(folder: Path) -> bool:
    """Whether a folder claims to be a capsule; models have the same two files."""
    if missing_files(folder, NEEDED_TO_LOAD):
        return False
    try:
        values = read_json(folder / CONFIG_FILE)
    except KVCapsuleError:
        return False
    return isinstance(values, dict) and "format_version" in values and "family" in values


def _below(folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Folders by name, no deeper than _DEEPEST; hidden ones are left out."""
    for top in folders:
        for place, below, _ in os.walk(top):
            folder = Path(place)
            deep = len(folder.relative_to(top).parts)
            below[:] = sorted(name for name in below if deep < _DEEPEST and name[0] != "." and name not in _NO_CAPSULES)
            yield str(folder), folder


def _downloaded() -> Iterator[tuple[str, Path]]:
    """The newest snapshot of each model repository in the cache of the Hub's client."""
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        if repository.repo_type == "model" and repository.revisions:
            newest = max(repository.revisions, key=lambda revision: revision.last_modified)
            yield repository.repo_id, newest.snapshot_path
