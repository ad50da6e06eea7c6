"""Sources that are read row by row and not as a whole: data sets on the Hub without a download, folders, files."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from . import text_files
from .shares import ALL, Share, parse
from .source_config import SourceConfig
from .text_files import FileRow

BUFFER = 1_000
"""Rows among which a stream is shuffled."""
_PARQUET = ".parquet"


@dataclass(frozen=True)
class Stream:
    """Rows with the columns that they came with, images undecoded."""

    rows: Callable[[], Iterator[FileRow]]
    """All of them, shuffled among BUFFER: the same ones at every call. Raises DataError if they cannot be read."""
    folder: Path | None
    """Where relative paths of images begin."""


def open_stream(config: SourceConfig) -> Stream:
    """The rows of a split of a source that is not built in.

    Raises:
        DataError: for a share of a split, or a source without splits of which not all is wanted: what of it is in a
            share is known only when all images are read.
    """
    require_named(config)
    share, path = parse(config.split), Path(config.source)
    if not share.complete:
        raise DataError(f"--data.streaming has no shares such as {config.split}: name a whole split, or leave it out.")
    if os.path.isfile(path):
        return _file(config, share, path)
    folder = path if os.path.isdir(path) else None

    def opened(datasets: Any) -> Any:
        if folder is None:
            return datasets.load_dataset(config.source, config.subset, split=share.split, streaming=True)
        return _of_folder(datasets, config, share, folder)

    return Stream(lambda: _of_datasets(config, opened), folder)


def require_named(config: SourceConfig) -> None:
    """Raises DataError if no source is named."""
    if not config.source.strip():
        raise DataError("--data.source is empty: name a built-in source, a file, a folder or a data set on the Hub.")


def shuffled(rows: Iterator[Any], random: np.random.Generator) -> Iterator[Any]:
    """Each time one of the next BUFFER rows."""
    waiting = list(islice(rows, BUFFER))
    for row in rows:
        place = int(random.integers(len(waiting)))
        out, waiting[place] = waiting[place], row
        yield out
    for place in random.permutation(len(waiting)):
        yield waiting[place]


def _file(config: SourceConfig, share: Share, path: Path) -> Stream:
    if config.subset is not None:
        raise DataError(f"--data.subset {config.subset}: {path} is a file, which has no subsets.")
    _require_all(config, share)
    kind = path.suffix.lower()
    if kind in text_files.READERS:
        return Stream(lambda: shuffled(_lines(path), np.random.default_rng(config.seed)), path.parent)
    if kind != _PARQUET:
        endings = ", ".join((*text_files.READERS, _PARQUET))
        raise DataError(f"{path}: data files end in {endings}; for a folder of images, name the folder.")

    def opened(datasets: Any) -> Any:
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)

    return Stream(lambda: _of_datasets(config, opened), path.parent)


def _require_all(config: SourceConfig, share: Share) -> None:
    if share.split != ALL:
        raise DataError(
            f"--data.streaming with --data.split {config.split}: {config.source} has no splits, and a share of its"
            f" images is known only when all are read. Take --data.split {ALL}, or leave --data.streaming out."
        )


def _lines(path: Path) -> Iterator[FileRow]:
    """Rows of a text file, with the columns of the first one."""
    columns: tuple[str, ...] = ()
    try:
        for label, values in text_files.READERS[path.suffix.lower()](path):
            columns = columns or tuple(values)
            yield FileRow(f"{label} of {path.name}", {name: values.get(name) for name in columns})
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _of_folder(datasets: Any, config: SourceConfig, share: Share, folder: Path) -> Any:
    if any(os.path.isfile(folder / name) for name in ("dataset_info.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.DatasetDict):
            _require_all(config, share)
            return saved.to_iterable_dataset()
        splits = {name: rows.to_iterable_dataset() for name, rows in saved.items()}
    elif any(any(folder.rglob(name)) for name in text_files.METADATA):
        splits = datasets.load_dataset("imagefolder", data_dir=str(folder), streaming=True)
    else:
        splits = datasets.load_dataset(str(folder), config.subset, streaming=True)
    if list(splits) == ["train"]:
        _require_all(config, share)
        return splits["train"]
    if share.split not in splits:
        raise DataError(f"{config.source} has no split {share.split!r}; it has {', '.join(map(str, splits))}.")
    return splits[share.split]


def _of_datasets(config: SourceConfig, opened: Callable[[Any], Any]) -> Iterator[FileRow]:
    rows = guarded(
        config,
        lambda datasets: iter(opened(datasets).decode(False).shuffle(seed=config.seed, buffer_size=BUFFER)),
    )
    number = 0
    while (row := guarded(config, lambda _: next(rows, None))) is not None:
        number += 1
        yield FileRow(f"row {number} of the stream of {config.source}", row)


def guarded(config: SourceConfig, opened: Callable[[Any], Any]) -> Any:
    """What `opened` returns, called with the package `datasets`, whose errors become one line."""
    import datasets

    try:
        return opened(datasets)
    except DataError:
        raise
    # A builder raises whatever its format's library does.
    except Exception as error:
        root: BaseException = error
        while isinstance(root, datasets.exceptions.DatasetGenerationError) and root.__cause__ is not None:
            root = root.__cause__
        reason = " ".join(str(root).split()) or type(root).__name__
        if not os.path.exists(config.source) and "Config name is missing" not in reason:
            reason = (
                f"there is no file or folder {os.path.abspath(config.source)}, and as a data set on the Hub: {reason}"
            )
        raise DataError(
            f"cannot load data from {config.source!r} (split {config.split!r}): {reason}"
            + (" Name one of them with --data.subset." if "Config name is missing" in reason else "")
        ) from error
