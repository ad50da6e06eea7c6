"""One result of several runs of a suite, each with some of its rows: `python -m kvcapsule.eval.report.merge_runs
--suite NAME --parts A.json,B.json`.

So that the rows of a slow model can be measured in several processes. Every run answers the same questions and has the
full cache's row, which tells whether they belong together.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from kvcapsule.atomic_files import to_json
from kvcapsule.cli.results import require_writable, write_whole
from kvcapsule.errors import InputError

from ..command_line import normal
from ..entries import FULL
from ..suite.suite import load, name_of
from . import curves, markdown, scatter

_OWN = ("rows", "command")
"""Keys in which the parts differ."""


@dataclass
class JoinConfig:
    """What is joined, and where the result goes."""

    suite: str
    """The suite whose rows they have, which says in what order they are shown."""
    json: str
    """File for the result."""
    parts: list[str] = field(default_factory=list)
    """Files of `kvcapsule eval --suite NAME --methods ... --json FILE`."""
    plot: str | None = None
    """File for a picture, as that of `kvcapsule eval`."""
    report: str | None = None
    """Markdown file whose table of the suite is brought up to date."""
    replace: bool = False
    """Let a later part's row stand in place of an earlier one's."""


def join(parts: Sequence[dict[str, Any]], order: Sequence[str], replace: bool = False) -> dict[str, Any]:
    """One object of several, its rows in the given order; replace: of a row that is there twice the last one.

    Raises:
        InputError: if the parts are not of one comparison, if a row is there twice, or if one that the order has is
        missing.
    """
    first, *others = parts
    for number, part in enumerate(others, start=2):
        if different := [key for key in first if key not in _OWN and first[key] != part.get(key)]:
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
    return {**first, "rows": [rows[name] for name in order], "command": " && ".join(part["command"] for part in parts)}


def _full(part: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in part["rows"] if row["method"] == FULL)
    return found


def main(config: JoinConfig) -> None:
    """Read, join and write.

    Raises:
        InputError: for files that cannot be read, joined or written.
    """
    if len(config.parts) < 2:
        raise InputError("--parts: give two files or more, as in --parts a.json,b.json.")
    require_writable([config.json, config.plot, config.report])
    order = [FULL, *(spec.name for spec in load(config.suite).specs)]
    found = join([_read(Path(part)) for part in config.parts], order, config.replace)
    write_whole(Path(config.json), to_json(found))
    if config.plot is not None:
        title = f"{found['model']} on {found['data']['source']}, {found['rows'][0]['n']} questions"
        scatter.draw(curves.picture(found["rows"], title), Path(config.plot))
    if config.report is not None:
        markdown.refresh(Path(config.report), name_of(config.suite), found, config.json, config.plot)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    return found


if __name__ == "__main__":
    try:
        main(auto_cli(JoinConfig, as_positional=False, args=normal(sys.argv[1:], {"--parts": True})))
    except InputError as error:
        raise SystemExit(f"the parts cannot be joined: {error}") from error
