"""Accuracy by data set, of a result on several: `python -m kvcapsule.eval.report.by_dataset --json FILE --report
FILE.md --name PLACE`.

A task of the source "pictures" has the data set's name in front; a set's accuracy is the mean over its tasks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from jsonargparse import auto_cli

from kvcapsule.data.source import PICTURES
from kvcapsule.errors import InputError

from ..entries import FULL
from . import markdown


@dataclass
class BySetConfig:
    """What is shown, and where."""

    json: str
    """What `kvcapsule eval --json` wrote."""
    report: str
    """Markdown file whose table is brought up to date."""
    name: str
    """Of the table's place in it: the lines <!-- table: NAME --> and <!-- end of table -->."""


def by_set(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Mean accuracy by data set, from that by task.

    Raises:
        InputError: for a task of no data set.
    """
    found: dict[str, list[float]] = {}
    for task, value in accuracy.items():
        name = next((name for name in PICTURES if task.startswith(f"{name}-")), None)
        if name is None:
            raise InputError(
                f"the task {task!r} is of none of {', '.join(PICTURES)}: give a result of `--data.source pictures`."
            )
        found.setdefault(name, []).append(value)
    return {name: mean(values) for name, values in found.items()}


def table(found: Mapping[str, Any]) -> str:
    """A row for each method, with the points that it loses against the full cache on each set."""
    rows = {row["method"]: by_set(row["accuracy"]) for row in found["rows"]}
    full = rows[FULL]
    lines = [["method", *full, "mean"]]
    for method, of in rows.items():
        pairs = [*((of[name], full[name]) for name in full), (mean(of.values()), mean(full.values()))]
        lines.append([method, *(_cell(own, None if method == FULL else whole) for own, whole in pairs)])
    return markdown.grid(lines)


def refresh(path: Path, name: str, result: Mapping[str, Any], json: str) -> None:
    """Put the table of a result between the markers of this name.

    Raises:
        InputError: if the result has tasks of no data set, or the file no such markers.
    """
    note = markdown.paragraph(
        f"Mean accuracy over the tasks of each data set, {result['rows'][0]['n']} questions in all; in brackets the"
        " points lost against the full cache."
    )
    markdown.put(path, name, "\n\n".join([table(result), note, markdown.command_block(path, result["command"], json)]))


def _cell(own: float, whole: float | None) -> str:
    # Adding 0 turns a negative zero into one without a sign.
    return f"{own:.3f}" if whole is None else f"{own:.3f} ({round(100 * (whole - own), 1) + 0:.1f})"


def main(config: BySetConfig) -> None:
    """Read and write.

    Raises:
        InputError: if a file cannot be read, has other tasks, or has no place for the table.
    """
    try:
        found: dict[str, Any] = json.loads(Path(config.json).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{config.json} cannot be read: {error}.") from error
    refresh(Path(config.report), config.name, found, config.json)


if __name__ == "__main__":
    try:
        main(auto_cli(BySetConfig, as_positional=False))
    except InputError as error:
        raise SystemExit(f"no table by data set: {error}") from error
