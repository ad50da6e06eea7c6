"""JSON and CSV files, each value as it was written and each row with its line.

`datasets` reads them by columns and guesses a type for each: 4 becomes 4.0 beside 4.5, 2020-01-01 a date, NA nothing.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""What names the images of a folder of them."""
_ENCODING = "utf-8-sig"
"""UTF-8, with or without the mark that spreadsheets write in front."""


class FileRow(NamedTuple):
    """A row and where it stands, such as "line 7"."""

    label: str
    values: dict[str, Any]


def read_rows(path: Path) -> list[FileRow]:
    """All rows of a file whose ending is one of READERS; rows that lack a column have None there.

    Raises:
        DataError: naming the line, if the file cannot be read.
    """
    try:
        rows = list(READERS[path.suffix.lower()](path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    columns = dict.fromkeys(name for row in rows for name in row.values)
    return [FileRow(label, {name: values.get(name) for name in columns}) for label, values in rows]


def _json(path: Path) -> Iterator[FileRow]:
    """A list of objects, or an object a line."""
    with path.open(encoding=_ENCODING) as file:
        first = next((line for line in file if line.strip()), "").lstrip()
        file.seek(0)
        if first.startswith("["):
            for number, values in enumerate(_parsed(file.read(), path.name), start=1):
                yield _row(f"row {number}", values, path)
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(f"line {number}", _parsed(line, f"line {number} of {path.name}"), path)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({error}): expected one object a line, or one list of objects.") from error


def _row(label: str, values: Any, path: Path) -> FileRow:
    if not isinstance(values, dict):
        raise DataError(f"{label} of {path.name} is of type {type(values).__name__}, expected an object.")
    return FileRow(label, values)


def _csv(path: Path, separator: str = ",") -> Iterator[FileRow]:
    """All values are texts; a row is named by its last line."""
    csv.field_size_limit(2**31 - 1)  # Images in base64 are long.
    with path.open(encoding=_ENCODING, newline="") as file:
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if len(set(names)) < len(names):
                raise DataError(f"{path.name} has two columns of one name; it has {', '.join(names)}.")
            for row in reader:
                if None in row:
                    raise DataError(
                        f"line {reader.line_num} of {path.name} has more values than the first line has names: put"
                        " values with commas in quotes."
                    )
                yield FileRow(f"line {reader.line_num}", row)
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {path.name} cannot be read: {error}.") from error


READERS: dict[str, Callable[[Path], Iterator[FileRow]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
}
"""By the ending of the file's name."""
