"""The tables of docs/bench-tables.md, one a level, each between its own markers; a run replaces those of its levels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcapsule.cli.results import write_whole

from ..report import markdown
from .level_tables import COLUMNS, ceilings, cells

_COPYING = ("dynamic-cat", "dynamic-cat-repeat", "static-repeat")


def table_name(device: str, level: str) -> str:
    """The name in the markers of a level's table."""
    return f"bench-{device.partition(':')[0]} {level}"


def require_places(path: Path, device: str, levels: Sequence[str]) -> None:
    """Raises InputError unless the file has a place for the table of each level."""
    for level in levels:
        markdown.require_place(path, table_name(device, level))


def refresh(path: Path, result: Mapping[str, Any], levels: Sequence[str], json: str | None, plot: str | None) -> None:
    """Put the tables of a run's levels into a Markdown file; one that is not there is made.

    Raises:
        InputError: if the file has no place for one of them.
        OSError: if it cannot be written.
    """
    if not path.exists():
        write_whole(
            path, markdown.blank("kvcapsule bench", [table_name(result["device"], level) for level in levels]).encode()
        )
    for level in levels:
        rows = [row for row in result["rows"] if row["level"] == level]
        table = _grid(rows) if level == "operator" else _plain(rows, level)
        parts = [table, _facts(result), markdown.command_block(path, result["command"], json)]
        left = [
            f"{x['geometry']}, {x['method'] or 'all methods'}: {x['reason']}"
            for x in result["skipped"]
            if x["level"] == level
        ]
        if level == "operator" and left:
            parts.append(f"Left out: {len(left)} cells or methods, each with its reason in the JSON.")
        elif left:
            parts.append(markdown.paragraph(f"Left out: {'; '.join(left)}."))
        if level == "serving" and plot is not None:
            parts.append(f"![sequences that fit and tokens a second]({markdown.link(path, plot)})")
        markdown.write_between_markers(path, table_name(result["device"], level), "\n\n".join(parts))


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a cell: how many times faster than the full cache in place, and with how many times fewer bytes; only
    the time for full caches that copy."""
    by_cell: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault((row["geometry"], row["visual_tokens"], row["batch"]), {})[row["method"]] = row
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if not name.startswith("in-place")]
    lines = [["geometry", "visual tokens", "batch", "in place, ms", *names]]
    for (geometry, visual, batch), cell in by_cell.items():
        baseline = next(iter(cell.values()))["baseline"]
        time = "–" if baseline is None else f"{cell[baseline]['seconds'] * 1e3:.2f}"
        lines.append([geometry, f"{visual:,}", str(batch), time, *(_ratio(cell.get(name)) for name in names)])
    return markdown.grid(lines)


def _ratio(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["ratio"] is None:
        return "wrong output" if row["failed"] else "–"
    faster = f"{row['ratio']:.2f}"
    return faster if row["method"] in _COPYING else f"{faster} of {row['bytes_ratio']:.2f}"


def _plain(rows: Sequence[Mapping[str, Any]], level: str) -> str:
    titles = [title for title, _ in COLUMNS[level].values()]
    return markdown.grid([titles, *cells(rows, level)])


def _facts(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    at = f"{ceilings(result)}; kernels: {result['kernels']}; {machine_of(result)}; {versions}; seed {result['seed']}."
    return markdown.paragraph(f"{at[0].upper()}{at[1:]}")


def machine_of(result: Mapping[str, Any]) -> str:
    """The machine that a run was made on, for people."""
    machine = result["machine"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    return cpu if result["device"] == "cpu" else f"{machine['accelerator']}, {cpu}"
