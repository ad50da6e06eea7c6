"""Reader of capsule folders: their files, the config and the header of the weights (format: checkpoints/FORMAT.md).

Errors name the file that is missing, damaged or of another version, and what to do about it.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..errors import CapsuleError, shortened
from .config import CapsuleConfig
from .limits import read_file, read_json
from .tensor_bytes import Form
from .training_rows import ROWS_FILE
from .weights_file import Header, read_header

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, RECIPE_FILE, METRICS_FILE)
"""The files of every capsule directory."""
REPORT_FILE = "report.html"
"""The page that `kvcapsule report` writes, for people; nothing reads it."""
OPTIONAL_FILES = (ROWS_FILE,)
"""Optional files, which are downloaded with the others; `REPORT_FILE` may lie beside them."""
NEEDED_TO_LOAD = (CONFIG_FILE, WEIGHTS_FILE)


def weights_metadata(config: CapsuleConfig) -> dict[str, str]:
    """Metadata of model.safetensors."""
    return {"format": "kvcapsule", "format_version": str(config.format_version)}


def missing_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that are no files of the folder."""
    # Not Path.is_file, which raises for a folder that may not be entered.
    return [name for name in names if not os.path.isfile(folder / name)]


def require_files(folder: Path, names: Iterable[str]) -> None:
    """Raises CapsuleError that names the files that a folder lacks."""
    missing = missing_files(folder, names)
    if missing:
        raise CapsuleError(
            f"{folder} is not a capsule directory: it lacks {', '.join(missing)}. "
            "Name a directory that `kvcapsule train` or Capsule.save_pretrained wrote."
        )


def config_in(folder: Path) -> CapsuleConfig:
    """The config of the capsule in `folder`.

    Raises:
        CapsuleError: if the file cannot be read, is damaged, or is no config of this format version.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    if not isinstance(values, dict) or "format_version" not in values:
        model = (
            f" but the model_type {shortened(repr(values['model_type']))} of a model"
            if isinstance(values, dict) and "model_type" in values
            else ""
        )
        raise CapsuleError(f"{path} is not the config of a capsule: it has no format_version{model}. Name a capsule.")
    try:
        return CapsuleConfig.from_dict(values)
    except CapsuleError as error:
        raise CapsuleError(f"{path}: {error}") from error
    except (AttributeError, TypeError) as error:
        raise CapsuleError(
            f"{path}: a value has the wrong type ({error}); the file is damaged or was changed by hand."
        ) from error


def card_in(folder: Path) -> str:
    """Raises CapsuleError if the model card in `folder` cannot be read."""
    try:
        return read_file(folder / CARD_FILE).decode()
    except UnicodeDecodeError as error:
        raise CapsuleError(f"{folder / CARD_FILE} is no text in UTF-8 ({error}): write or save it again.") from error


def header_in(folder: Path, config: CapsuleConfig) -> Header:
    """What the weights of the capsule in `folder` announce; config: of the same.

    Raises:
        CapsuleError: if the file is damaged or of another format version.
    """
    path = folder / WEIGHTS_FILE
    header = read_header(path)
    for key, expected in weights_metadata(config).items():
        if (value := header.metadata.get(key)) != expected:
            raise CapsuleError(
                f"{path} has {key} {shortened(repr(value))} in its metadata, where {CONFIG_FILE} asks for"
                f" {expected!r}. The file is not this capsule's, or a newer kvcapsule wrote it."
            )
    return header


def require_tensors(folder: Path, tensors: Mapping[str, Form], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises CapsuleError that names every tensor of the folder that is missing, unexpected, or of another shape or
    number type."""
    faults = [f"{key} is missing" for key in expected if key not in tensors]
    faults += [f"{shortened(key)} is unexpected" for key in sorted(tensors) if key not in expected]
    for key in expected.keys() & tensors.keys():
        have, want = tensors[key], expected[key]
        if have.shape != want.shape:
            faults.append(f"{key} has the shape {tuple(have.shape)} and not {tuple(want.shape)}")
        elif have.dtype != want.dtype and not (have.dtype.is_floating_point and want.dtype.is_floating_point):
            faults.append(f"{key} holds {have.dtype} and not {want.dtype}")
    if faults:
        listed = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CapsuleError(
            f"{folder / WEIGHTS_FILE} does not hold the tensors that {CONFIG_FILE} asks for: {listed}. The two are of"
            " different capsules."
        )
