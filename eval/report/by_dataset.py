"""Accuracy by data set, of a result on several data sets: `python -m kvcapsule.eval.report.by_dataset --json FILE
--report FILE.md --name NAME`.

Tasks of the source "pictures" begin with the data set's name; a data set's accuracy is the mean over its tasks.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from kvcapsule.data.source import PICTURES
from kvcapsule.errors import InputError
from kvcapsule.methods.shown_names import shown_name

from ..entries import FULL
from . import markdown
from .file_command import FileCommand, read_result

PROG = "python -m kvcapsule.eval.report.by_dataset"


@dataclass(frozen=True)
class ByDatasetConfig:
    """Which result is shown, and where."""

    json: str
    """File of `kvcapsule eval --json` to read."""
    report: str
    """Markdown file in which the table is updated."""
    name: str
    """Name of the table, as in the lines <!-- table: NAME --> and <!-- end of table --> of the report."""


def by_dataset(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Mean accuracy by data set, from that by task.

    Raises:
        InputError: for a task of no data set.
    """
    values: dict[str, list[float]] = {}
    for task, value in accuracy.items():
        name = next((name for name in PICTURES if task.startswith(f"{name}-")), None)
        if name is None:
            raise InputError(
                f"the task {task!r} is of none of {', '.join(PICTURES)}: give a result of `--data.source pictures`."
            )
        values.setdefault(name, []).append(value)
    return {name: mean(of_tasks) for name, of_tasks in values.items()}


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table with a row for each method: accuracy, and the points lost against the full cache."""
    rows = {row["method"]: by_dataset(row["accuracy"]) for row in result["rows"]}
    full = rows[FULL]
    lines = [["method", *full, "mean"]]
    for method, accuracy in rows.items():
        pairs = [*((accuracy[name], full[name]) for name in full), (mean(accuracy.values()), mean(full.values()))]
        lines.append(
            [shown_name(method), *(_cell(value, None if method == FULL else of_full) for value, of_full in pairs)]
        )
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
    markdown.write_between_markers(
        path, name, "\n\n".join([table(result), note, markdown.command_block(path, result["command"], json)])
    )


def _cell(accuracy: float, full: float | None) -> str:
    # Adding 0 turns a negative zero into one without a sign.
    return f"{accuracy:.3f}" if full is None else f"{accuracy:.3f} ({round(100 * (full - accuracy), 1) + 0:.1f})"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return FileCommand(
        PROG,
        ByDatasetConfig,
        usage="--json FILE --report FILE.md --name NAME",
        description="Write a table of accuracy by data set, of a result of `kvcapsule eval` on several data sets.",
        run=update_table,
    ).main(argv)


def update_table(config: ByDatasetConfig) -> None:
    """Read the result and update the table.

    Raises:
        InputError: if a file cannot be read, has other tasks, or has no place for the table.
    """
    refresh(Path(config.report), config.name, read_result(Path(config.json)), config.json)


if __name__ == "__main__":
    sys.exit(main())
