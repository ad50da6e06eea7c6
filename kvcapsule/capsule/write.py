"""Writer of capsule folders: a new capsule, or new measurements in an existing one.

All files are built in memory before the first byte is written, so their size is known, and an invalid recipe or
metric leaves no partial files.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import atomic_files
from ..errors import CapsuleError
from . import weights_file
from .capsule_folder import new_folder, restore
from .card import CARD_LOADS, CARD_MEASURED, MEASURED_TITLE, measured_section, model_card
from .config import LEAN_VERSION, CapsuleConfig
from .lean_tensors import lean
from .limits import read_json
from .read import (
    CARD_FILE,
    CONFIG_FILE,
    FILES,
    METRICS_FILE,
    OPTIONAL_FILES,
    RECIPE_FILE,
    REPORT_FILE,
    WEIGHTS_FILE,
    card_in,
    require_files,
    weights_metadata,
)
from .training_rows import ROWS_FILE, TrainingRows


def save_folder(
    config: CapsuleConfig,
    tensors: Mapping[str, torch.Tensor],
    directory: str | os.PathLike[str],
    recipe: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    card_name: str | None,
    training_rows: TrainingRows | None = None,
) -> None:
    """Write a capsule directory; see Capsule.save_pretrained.

    An existing capsule is replaced only after the new one is completely on disk.

    Args:
        config: the capsule's config.
        tensors: its parameters and buffers, by name.
        directory: a new or empty directory, or one that holds a capsule and nothing else.
        recipe: how the capsule was trained, in types that YAML knows.
        metrics: {"train": {name: number}, "eval": {"rows": [...]}}, see checkpoints/FORMAT.md.
        card_name: the name that the model card passes to `from_pretrained`; by default the directory's.
        training_rows: what it was trained on; None writes no such file.

    Raises:
        CapsuleError: if the directory holds other files, cannot be written, or the disk is full. No partial files
            remain, and the directory is unchanged.
        TypeError: if recipe or metrics hold objects that cannot be written as text.
    """
    target = new_folder(directory)
    contents = contents_of(config, tensors, recipe, metrics, card_name or target.name)
    if training_rows is not None:
        contents[ROWS_FILE] = training_rows.to_bytes()
    try:
        require_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.replace_folder(target, contents)
    except OSError as error:
        raise CapsuleError(atomic_files.write_failure(target, sum(map(len, contents.values())), error)) from error


def update_metrics(directory: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Update the measurements of a saved capsule: metrics.json, key by key, and the card's section "Measured".

    Args:
        directory: a capsule directory.
        metrics: see `save_folder`; keys that it lacks ("train", "eval") are left unchanged.

    Raises:
        CapsuleError: if the directory is no capsule, its metrics.json is damaged, or the files cannot be written.
        TypeError: if metrics holds objects that cannot be written as text.
    """
    folder, plain = new_folder(directory), atomic_files.plain(metrics, "metrics")
    restore(folder)
    require_files(folder, FILES)
    path = folder / METRICS_FILE
    card = card_in(folder)
    loads = CARD_LOADS.search(card)
    try:
        merged = {**read_json(path), **plain}
        measured = measured_section(merged, loads["name"] if loads else folder.name)
    except (AttributeError, TypeError, CapsuleError) as error:
        raise CapsuleError(
            f"{path} is damaged, so nothing was put into it ({error}): replace its content by {{}}."
        ) from error
    section = f"{MEASURED_TITLE}\n\n{measured}\n\n"
    contents = {
        METRICS_FILE: atomic_files.to_json(merged),
        CARD_FILE: CARD_MEASURED.sub(lambda _: section, card).encode(),
    }
    unique = atomic_files.unique_name(folder)
    partials = {name: folder.with_name(f"{unique}.{name}.partial") for name in contents}
    try:
        try:
            for name, content in contents.items():
                atomic_files.write(partials[name], content)
            for name, partial in partials.items():
                partial.replace(folder / name)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
        atomic_files.remove_litter(folder)
    except OSError as error:
        raise CapsuleError(atomic_files.write_failure(folder, sum(map(len, contents.values())), error)) from error


def contents_of(
    config: CapsuleConfig,
    tensors: Mapping[str, torch.Tensor],
    recipe: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    name: str,
) -> dict[str, bytes]:
    """Contents of the five files by file name; see `save_folder`."""
    plain_recipe, plain_metrics = (
        atomic_files.plain(recipe or {}, "recipe"),
        atomic_files.plain(metrics or {}, "metrics"),
    )
    return {
        CONFIG_FILE: atomic_files.to_json(atomic_files.plain(config.to_dict(), "config")),
        WEIGHTS_FILE: weights_file.write(
            lean(tensors) if config.format_version == LEAN_VERSION else tensors, weights_metadata(config)
        ),
        CARD_FILE: model_card(config, plain_recipe, plain_metrics, name).encode(),
        RECIPE_FILE: atomic_files.to_yaml(plain_recipe).encode(),
        METRICS_FILE: atomic_files.to_json(plain_metrics),
    }


def require_replaceable(target: Path) -> None:
    """Raises CapsuleError if saving to `target` would delete files that are not a capsule's."""
    if target.exists() and not target.is_dir():
        raise CapsuleError(f"{target} is a file: name a directory to save the capsule in.")
    entries = sorted(os.listdir(target)) if target.exists() else []
    others = [entry for entry in entries if entry not in (*FILES, *OPTIONAL_FILES, REPORT_FILE)]
    if others or (entries and not _holds_capsule(target)):
        names = others or entries
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise CapsuleError(
            f"{target} is not empty and not a capsule directory (it holds {listed}): a capsule saved there would"
            " replace all that. Choose a new or an empty directory."
        )


def _holds_capsule(folder: Path) -> bool:
    """Whether the folder's config.json belongs to a capsule, of any format version."""
    try:
        values = read_json(folder / CONFIG_FILE)
    except CapsuleError:
        return False
    return isinstance(values, dict) and {"format_version", "family"} <= values.keys()
