"""Opens a source of rows: a file, a folder, or a data set on the Hub. What its columns mean is not known here."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from . import text_files
from .shares import Share, parse
from .source_config import SourceConfig
from .streams import guarded, open_stream, require_named

if TYPE_CHECKING:
    import datasets

_PARQUET = ".parquet"
_ENDINGS = (*text_files.READERS, _PARQUET)


@dataclass(frozen=True)
class Table:
    """Rows with the columns that they came with, images undecoded."""

    rows: "datasets.Dataset | Sequence[Mapping[str, Any]]"
    columns: tuple[str, ...]
    label: Callable[[int], str]
    """How the user counts a row, such as "line 7", by its index."""
    share: Share
    """What is wanted of these rows."""
    folder: Path | None = None
    """Where relative paths of images begin."""
    unsplit: bool = False
    """Whether the source has no splits of its own."""

    def __len__(self) -> int:
        return len(self.rows)


def open_table(config: SourceConfig) -> Table:
    """The rows of a source that is not built in; with its split, all of them.

    Raises:
        DataError: if there is no such source, subset or split, or if it is damaged or empty.
    """
    require_named(config)
    share, path = parse(config.split), Path(config.source)
    if config.streaming:
        table = _first_of_stream(config, share)
    elif os.path.isfile(path):
        table = _file(config, share, path)
    elif any(os.path.isfile(path / name) for name in ("dataset_info.json", "dataset_dict.json")):
        table = _of_datasets(config, share, lambda datasets: datasets.load_from_disk(str(path)))
    else:
        table = _of_datasets(config, share, lambda datasets: _load(datasets, config, path, share))
    if not len(table):
        raise DataError(f"{config.source} (split {config.split!r}) holds no rows.")
    return table


def _first_of_stream(config: SourceConfig, share: Share) -> Table:
    """As many rows of a stream as are wanted, in memory."""
    stream = open_stream(config)
    rows = list(islice(stream.rows(), config.size))
    columns = tuple(rows[0].values) if rows else ()
    return Table([row.values for row in rows], columns, lambda i: rows[i].label, share, stream.folder)


def _file(config: SourceConfig, share: Share, path: Path) -> Table:
    if config.subset is not None:
        raise DataError(f"--data.subset {config.subset}: {path} is a file, which has no subsets.")
    share = share.of_unsplit(config.source)
    if path.suffix.lower() in text_files.READERS:
        rows = text_files.read_rows(path)
        columns = tuple(rows[0].values) if rows else ()
        values = [row.values for row in rows]
        return Table(values, columns, lambda i: f"{rows[i].label} of {path.name}", share, path.parent, unsplit=True)
    if path.suffix.lower() != _PARQUET:
        raise DataError(f"{path}: data files end in {', '.join(_ENDINGS)}; for a folder of images, name the folder.")
    rows = guarded(config, lambda datasets: datasets.Dataset.from_parquet(str(path)))
    return _arrow(rows, share, lambda i: f"row {i + 1} of {path.name}", path.parent, unsplit=True)


def _of_datasets(config: SourceConfig, share: Share, opened: Callable[[Any], Any]) -> Table:
    """A `datasets.Dataset`, or the wanted one of a DatasetDict."""
    import datasets

    rows, folder = guarded(config, opened), Path(config.source)

    def label(index: int) -> str:
        return f"row {index + 1} of {config.source}"

    local = folder if os.path.isdir(folder) else None
    if isinstance(rows, datasets.DatasetDict) and not (local and list(rows) == ["train"]):
        if share.split not in rows:
            names = ", ".join(map(str, rows))
            raise DataError(
                f"{config.source} has no split {share.split!r}; it has {names}, and shares such as"
                f" {next(iter(rows))}[:80%]."
            )
        return _arrow(rows[share.split], share, label, local)
    if isinstance(rows, datasets.DatasetDict):
        rows = rows["train"]
    elif local is None:
        # The wanted split of a data set on the Hub.
        return _arrow(rows, share, label, None)
    return _arrow(rows, share.of_unsplit(config.source), label, local, unsplit=True)


def _load(datasets: Any, config: SourceConfig, path: Path, share: Share) -> Any:
    if not os.path.isdir(path):
        return datasets.load_dataset(config.source, config.subset, split=share.split)
    cache = str(_cache(datasets, path))
    if any(any(path.rglob(name)) for name in text_files.METADATA):
        return datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=cache)
    return datasets.load_dataset(str(path), config.subset, cache_dir=cache)


def _cache(datasets: Any, folder: Path) -> Path:
    """Where `datasets` keeps what it makes of a folder as it is now: by itself it takes two folders of one name, whose
    README.md names configurations, for the same."""
    states = sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*"))
    digest = hashlib.blake2b(repr((str(folder.resolve()), states)).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "kvcapsule" / digest


def _arrow(
    rows: "datasets.Dataset", share: Share, label: Callable[[int], str], folder: Path | None, unsplit: bool = False
) -> Table:
    """A table of a data set, its images undecoded, so that an error about an image can name its row."""
    for name, feature in rows.features.items():
        if (undecoded := _undecoded(feature)) is not None:
            rows = rows.cast_column(name, undecoded)
    return Table(rows, tuple(rows.column_names), label, share, folder, unsplit)


def _undecoded(feature: Any) -> Any:
    """The feature of images that a column holds, one or a list each; None for a column that holds none."""
    import datasets

    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _undecoded(feature.feature)
        return inner and datasets.List(inner)
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    encoded = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if isinstance(feature, datasets.Image) or binary or encoded:
        return datasets.Image(decode=False)
    return None
