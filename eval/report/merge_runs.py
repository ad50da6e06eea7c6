"""One result of several runs of a suite, each with some of its rows: `python -m kvcapsule.eval.report.merge_runs
--suite NAME --parts A.json,B.json`.

The rows of a slow model can thus be measured in several processes. Every run answers the same questions and has the
row of the full cache, which shows whether the runs belong together.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcapsule.cli.results import json_file, require_writable, write_json
from kvcapsule.errors import InputError

from ..entries import FULL
from ..suite.shipped import name_of
from ..suite.suite import load
from . import markdown, rate_curves
from .file_command import FileCommand, read_result
from .picture import save_picture
from .title import title_of

PROG = "python -m kvcapsule.eval.report.merge_runs"
_MAY_DIFFER = ("rows", "command", "seen")
"""Keys in which the parts may differ."""


@dataclass(frozen=True)
class MergeConfig:
    """Which results are merged, and where the result is written."""

    suite: str
    """The suite of the runs, whose order the rows get."""
    json: str
    """File for the result as JSON; - prints it."""
    parts: list[str] = field(default_factory=list)
    """Files of `kvcapsule eval --suite NAME --methods ... --json FILE`; repeat it or use commas."""
    plot: str | None = None
    """File for a picture, as that of `kvcapsule eval`: .png, .svg or .pdf."""
    report: str | None = None
    """Markdown file in which the table of the suite is updated."""
    replace: bool = False
    """Where two parts have the same row, use that of the later part."""


def merge(parts: Sequence[dict[str, Any]], order: Sequence[str], replace: bool = False) -> dict[str, Any]:
    """Merge results of runs into one.

    Args:
        parts: results, as docs/eval-json.md describes them.
        order: names of the rows, in the order that they get.
        replace: of a row that two parts have, use that of the later part.

    Raises:
        InputError: if the parts are not of one comparison, if a row is there twice, or if one that the order has is
        missing.
    """
    first, *others = parts
    for number, part in enumerate(others, start=2):
        if different := [key for key in first if key not in _MAY_DIFFER and first[key] != part.get(key)]:
            raise InputError(f"part {number} is of another run than the first: its {', '.join(different)} differs.")
        if _full(part) != _full(first):
            raise InputError(f"part {number} is of another run than the first: its full cache answers otherwise.")
    rows: dict[str, dict[str, Any]] = {FULL: _full(first)}
    for row in (row for part in parts for row in part["rows"] if row["method"] != FULL):
        if row["method"] in rows and not replace:
            raise InputError(f"{row['method']} is there twice: give each row to one part, or --replace true.")
        rows[row["method"]] = row
    if missing := [name for name in order if name not in rows]:
        raise InputError(f"no part has {', '.join(missing)}: measure them with --methods {','.join(missing)}.")
    merged = {
        **first,
        "rows": [rows[name] for name in order],
        "command": " && ".join(part["command"] for part in parts),
    }
    # Results of earlier versions lack it.
    if any("seen" in part for part in parts):
        merged["seen"] = {name: share for part in parts for name, share in part.get("seen", {}).items()}
    return merged


def _full(part: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in part["rows"] if row["method"] == FULL)
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return FileCommand(
        PROG,
        MergeConfig,
        usage="--suite NAME --parts A.json,B.json --json FILE [options]",
        description="Merge results of several runs of a suite, each with some of its rows, into one result.",
        run=merge_files,
        lists={"parts": True},
    ).main(argv)


def merge_files(config: MergeConfig) -> None:
    """Read the parts, merge them, and write the result.

    Raises:
        InputError: for files that cannot be read, merged or written.
    """
    if len(config.parts) < 2:
        raise InputError("--parts: give two files or more, as in --parts a.json,b.json.")
    require_writable([config.json, config.plot, config.report])
    order = [FULL, *(spec.name for spec in load(config.suite).specs)]
    result = merge([read_result(Path(part)) for part in config.parts], order, config.replace)
    write_json(config.json, result)
    if config.plot is not None:
        save_picture(rate_curves.picture(result["rows"], title_of(result)), Path(config.plot))
    if config.report is not None:
        markdown.refresh(Path(config.report), name_of(config.suite), result, json_file(config.json), config.plot)


if __name__ == "__main__":
    sys.exit(main())
