"""The model and the data that a capsule was trained with, for commands that take them unless told otherwise.

A capsule's own files name a folder or file by its last part alone. Where it lay is written beside the capsule, in
OUTPUT.run/places.json, which stays on the machine that trained it.
"""

import json
import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from .. import atomic_files
from ..data.source import SourceConfig
from ..errors import CapsuleError, InputError
from .hub import local_folder, read_config
from .record import DATA, ModelRecord, data_record, is_local, portable

RUN_SUFFIX = ".run"
PLACES_FILE = "places.json"
_NOT_OF_THE_SOURCE = ("split", "size", "seed")
"""Fields of SourceConfig that say which rows of a source are used."""
_OTHER_SPLITS = ("test", "validation")
"""Splits to measure on, in order."""


class TrainedWith(NamedTuple):
    """The model and the data of a capsule, as load_vlm and SourceConfig take them."""

    model: str
    revision: str | None
    data: dict[str, Any]
    """Fields of SourceConfig without size and seed, the split being one that was not trained on; empty where the data
    are not recorded."""


def trained_with(name: str | os.PathLike[str]) -> TrainedWith:
    """What a capsule was trained with.

    Args:
        name: a folder, a shipped capsule or an id on the Hub.

    Raises:
        CapsuleError: if there is no such capsule, or its config is damaged.
        InputError: if its model or data lay in a folder or file that is not here; the message names the option to give.
    """
    config, folder = read_config(name), local_folder(name, None)
    places = {} if folder is None else _places(folder)
    record, data = ModelRecord.of(config.metadata), data_record(config.metadata)
    model = config.base_model
    if record.local or Path(model).is_absolute():
        model = _place(name, "model", model, places, "--model and its folder, or its id on the Hub")
    if data:
        split = str(data["split"]).partition("[")[0]
        source = data["source"]
        if data.get("local"):
            source = _place(name, "data", source, places, "--data.source and its place")
        known = {field.name for field in fields(SourceConfig)}
        other = next(other for other in _OTHER_SPLITS if other != split)
        data = {**{key: value for key, value in data.items() if key in known}, "source": source, "split": other}
    return TrainedWith(model, None if record.local else config.base_revision, data)


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
        OSError: if the file cannot be written.
    """
    named = {"model": model, "data": source}
    places = {key: str(Path(name).expanduser().resolve()) for key, name in named.items() if is_local(name)}
    path = _places_file(capsule)
    if places:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(path, atomic_files.to_json(places))
    else:
        path.unlink(missing_ok=True)


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


def _place(name: str | os.PathLike[str], kind: str, recorded: str, places: dict[str, Any], option: str) -> str:
    """Where a folder or file is that a capsule records by name.

    Raises:
        InputError: if it is not here.
    """
    for place in (str(places.get(kind, "")), recorded):
        with suppress(OSError, RuntimeError, ValueError):
            if place and Path(place).exists():
                return place
    last = Path(recorded).name
    raise InputError(
        f"the capsule {os.fspath(name)} was trained with the {kind} in {last!r} of the machine that trained it, which"
        f" is not here: give {option}."
    )
