"""The model and the data that a capsule was trained with, for commands that take them unless told otherwise.

A capsule's own files name a folder or file by its last part alone. Where it lay is written beside the capsule, in
OUTPUT.run/places.json, which stays on the machine that trained it.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .. import atomic_files
from ..data.source_config import SourceConfig
from ..errors import CapsuleError, InputError
from .config import CapsuleConfig
from .hub import local_folder, read_config
from .local_names import is_local, portable
from .record import DATA, MODEL, ModelRecord, data_record

RUN_SUFFIX = ".run"
PLACES_FILE = "places.json"
_NOT_OF_THE_SOURCE = ("split", "size", "seed")
"""Fields of SourceConfig that say which rows of a source are used."""
_OTHER_SPLITS = ("test", "validation")
"""Splits to measure on, in order."""


@dataclass(frozen=True)
class TrainedWith:
    """The model and the data of a capsule, as load_vlm and SourceConfig take them."""

    capsule: str
    """Its name, for messages."""
    config: CapsuleConfig
    places: dict[str, Any]
    """Where folders and files lay, by MODEL and DATA."""

    @property
    def revision(self) -> str | None:
        """Revision of the model on the Hub."""
        return None if ModelRecord.of(self.config.metadata).local else self.config.base_revision

    def model(self) -> str:
        """The model's name or folder.

        Raises:
            InputError: if it lay in a folder that is not here.
        """
        name = self.config.base_model
        if ModelRecord.of(self.config.metadata).local or Path(name).is_absolute():
            return self._place(MODEL, name, "--model and its folder, or its id on the Hub")
        return name

    def data(self) -> dict[str, Any]:
        """Fields of SourceConfig without size and seed, the split being another than the one that was trained on; empty
        where the data are not recorded.

        Raises:
            InputError: if they lay in a folder or file that is not here.
        """
        record = data_record(self.config.metadata)
        if not record:
            return {}
        source = str(record["source"])
        if record.get("local"):
            source = self._place(DATA, source, "--data.source and its place")
        learned = str(record["split"]).partition("[")[0]
        split = next(other for other in _OTHER_SPLITS if other != learned)
        known = {field.name for field in fields(SourceConfig)}
        return {**{key: value for key, value in record.items() if key in known}, "source": source, "split": split}

    def _place(self, kind: str, recorded: str, option: str) -> str:
        """Where a folder or file is that the capsule records by name."""
        for place in (str(self.places.get(kind, "")), recorded):
            with suppress(OSError, RuntimeError, ValueError):
                if place and Path(place).exists():
                    return place
        raise InputError(
            f"the capsule {self.capsule} was trained with the {kind} in {Path(recorded).name!r} of the machine that"
            f" trained it, which is not here: give {option}."
        )


def trained_with(name: str | os.PathLike[str]) -> TrainedWith:
    """What a capsule was trained with.

    Args:
        name: a folder, a shipped capsule or an id on the Hub.

    Raises:
        CapsuleError: if there is no such capsule, or its config is damaged.
    """
    config, folder = read_config(name), local_folder(name, None)
    return TrainedWith(os.fspath(name), config, {} if folder is None else _places(folder))


def record_of_data(data: SourceConfig) -> dict[str, Any]:
    """What a capsule records of the data that it was trained on: its source, columns and split."""
    values = {
        field.name: getattr(data, field.name)
        for field in fields(data)
        if field.name == "split" or field.name not in _NOT_OF_THE_SOURCE
    }
    return {DATA: {**values, "source": portable(data.source), "local": is_local(data.source)}}


def write_places(capsule: Path, model: str, source: str) -> None:
    """Note on this machine where a capsule's model and data lay, those that were folders or files.

    Raises:
        InputError: if the file cannot be written; the capsule itself is not touched.
    """
    named = {MODEL: model, DATA: source}
    places = {key: str(Path(name).expanduser().resolve()) for key, name in named.items() if is_local(name)}
    path = _places_file(capsule)
    try:
        if places:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_files.replacing(path) as temporary:
                temporary.write_bytes(atomic_files.to_json(places))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"the capsule is saved, but {path} cannot be written ({error.strerror or error}): eval and generate need"
            " --model and --data.source for it."
        ) from error


def _places_file(capsule: Path) -> Path:
    folder = capsule.expanduser().resolve()
    return folder.with_name(folder.name + RUN_SUFFIX) / PLACES_FILE


def _places(capsule: Path) -> dict[str, Any]:
    path = _places_file(capsule)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CapsuleError(f"{path} cannot be read ({error}): delete it, and name model and data yourself.") from error
    return values if isinstance(values, dict) else {}
