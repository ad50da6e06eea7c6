"""Reader of capsule folders: their files, the config and the tensors (format: checkpoints/FORMAT.md).

Errors name the file that is missing, damaged or of another version, and what to do about it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CapsuleError
from .config import FORMAT_VERSION, CapsuleConfig
from .training_rows import ROWS_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, RECIPE_FILE, METRICS_FILE)
"""The files of every capsule directory."""
OPTIONAL_FILES = (ROWS_FILE,)
"""Files that a capsule directory may have beside them; it has no others."""
NEEDED_TO_LOAD = (CONFIG_FILE, WEIGHTS_FILE)
WEIGHTS_METADATA = {"format": "kvcapsule", "format_version": str(FORMAT_VERSION)}
"""Metadata of model.safetensors."""
LFS_POINTER = b"version https://git-lfs"


def missing_files(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]


def require_files(folder: Path, names: Iterable[str]) -> None:
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
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CapsuleError(
            f"{path} is not JSON ({error}): the file is damaged. Save, copy or download the capsule again."
        ) from error
    if not isinstance(values, dict) or "format_version" not in values:
        model = (
            f" but the model_type {values['model_type']!r} of a model"
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


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the capsule in `folder`, on the CPU, with the dtypes that they were saved in.

    Raises:
        CapsuleError: if the file is damaged or of another format version.
    """
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: tensors that stay mapped to the file would change, or crash the process, when another program
            # rewrites it in place.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CapsuleError(f"{path} cannot be read ({error}): {_diagnosis(path)}") from error
    for key, expected in WEIGHTS_METADATA.items():
        if metadata.get(key) != expected:
            raise CapsuleError(
                f"{path} has {key} {metadata.get(key)!r} in its metadata; this version of kvcapsule reads {expected!r}."
                " The file is not a capsule's, or a newer kvcapsule wrote it."
            )
    return tensors


def _diagnosis(path: Path) -> str:
    """Why a file is not valid safetensors, judged by its size and its header."""
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
            expected = header_end + max(
                (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
            )
            if size != expected:
                return (
                    f"it has {size:,} bytes where its header announces {expected:,}, so it was cut off or overwritten."
                    f" {again}"
                )
        return f"its {size:,} bytes are no safetensors file, or only the beginning of one. {again}"
    return f"it is no sound safetensors file. {again}"


def require_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises CapsuleError that names every tensor of the folder that is missing, unexpected, or of another shape or
    number type."""
    faults = [f"{key} is missing" for key in expected if key not in tensors]
    faults += [f"{key} is unexpected" for key in sorted(tensors) if key not in expected]
    for key in expected.keys() & tensors.keys():
        have, want = tensors[key], expected[key]
        if have.shape != want.shape:
            faults.append(f"{key} has the shape {tuple(have.shape)} and not {tuple(want.shape)}")
        elif have.dtype != want.dtype and not (have.is_floating_point() and want.is_floating_point()):
            faults.append(f"{key} holds {have.dtype} and not {want.dtype}")
    if faults:
        listed = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CapsuleError(
            f"{folder / WEIGHTS_FILE} does not hold the tensors that {CONFIG_FILE} asks for: {listed}. The two are of"
            " different capsules."
        )
