"""A run as tables that a person reads, one for each level."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "operator": {
        "geometry": ("geometry", "{}"),
        "visual_tokens": ("visual", "{:,}"),
        "batch": ("batch", "{}"),
        "method": ("method", "{}"),
        "ratio": ("faster", "{:.2f}x"),
        "bytes_ratio": ("fewer bytes", "{:.2f}x"),
        "bytes": ("bytes", "{:,}"),
        "traffic_bytes": ("traffic", "{:,}"),
        "seconds": ("ms", "{:.3f}"),
        "iqr_seconds": ("IQR", "{:.3f}"),
        "bandwidth_fraction": ("of read GB/s", "{:.0%}"),
    },
    "encode": {
        "geometry": ("geometry", "{}"),
        "visual_tokens": ("visual", "{:,}"),
        "method": ("method", "{}"),
        "share": ("of prefill", "{:.1%}"),
        "seconds": ("ms", "{:.3f}"),
        "iqr_seconds": ("IQR", "{:.3f}"),
    },
    "step": {
        "geometry": ("model", "{}"),
        "batch": ("batch", "{}"),
        "method": ("method", "{}"),
        "ratio": ("faster", "{:.2f}x"),
        "bound": ("at most", "{:.2f}x"),
        "bytes_ratio": ("fewer bytes", "{:.2f}x"),
        "bytes": ("bytes", "{:,}"),
        "seconds": ("ms", "{:.3f}"),
        "iqr_seconds": ("IQR", "{:.3f}"),
        "tokens_s": ("tokens/s", "{:.1f}"),
        "bandwidth_fraction": ("of read GB/s", "{:.0%}"),
    },
    "end-to-end": {
        "geometry": ("model", "{}"),
        "batch": ("batch", "{}"),
        "method": ("method", "{}"),
        "ratio": ("faster", "{:.2f}x"),
        "whole_ratio": ("with prefill", "{:.2f}x"),
        "ttft_seconds": ("TTFT ms", "{:.1f}"),
        "ttft_overhead": ("longer", "{:+.1%}"),
        "seconds": ("TPOT ms", "{:.3f}"),
        "tokens_s": ("tokens/s", "{:.1f}"),
        "bytes": ("bytes", "{:,}"),
        "peak_bytes": ("peak bytes", "{:,}"),
    },
    "serving": {
        "geometry": ("model", "{}"),
        "budget_mib": ("MiB", "{:g}"),
        "method": ("method", "{}"),
        "batch": ("largest batch", "{:,}"),
        "batch_ratio": ("larger", "{:.1f}x"),
        "tokens_s": ("tokens/s", "{:,.1f}"),
        "ratio": ("more", "{:.2f}x"),
        "bytes": ("bytes", "{:,}"),
    },
}
"""Of each level's table: keys of a row, with title and format. Seconds are shown in ms."""
_MS = ("seconds", "iqr_seconds", "ttft_seconds")


def tables(found: Mapping[str, Any]) -> list[Table | str]:
    """The tables, and lines about what was measured beside them and what was left out."""
    parts: list[Table | str] = []
    for level, columns in COLUMNS.items():
        if rows := [row for row in found["rows"] if row["level"] == level]:
            table = Table(title=level, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            for title, _ in columns.values():
                table.add_column(
                    title, justify="left" if title in ("geometry", "model", "method") else "right", no_wrap=True
                )
            for line in cells(rows, level):
                table.add_row(*line)
            parts.append(table)
    parts.append(ceilings(found))
    parts += [f"{_place(left)}: {left['reason']}" for left in found["skipped"]]
    return parts


def cells(rows: Sequence[Mapping[str, Any]], level: str) -> list[list[str]]:
    """What a table of the level shows of each row; the baseline's method is marked."""
    shown = []
    for row in rows:
        line = [_cell(row[key], form, 1e3 if key in _MS else None) for key, (_, form) in COLUMNS[level].items()]
        place = list(COLUMNS[level]).index("method")
        if row["method"] == row["baseline"]:
            line[place] += " (baseline)"
        if row["failed"] is not None:
            line[place] += f" ({row['failed']})"
        shown.append(line)
    return shown


def ceilings(found: Mapping[str, Any]) -> str:
    """The line about the machine's ceilings."""
    at = found["ceilings"]
    return (
        f"ceilings: read {at['read_gb_s']:.1f} GB/s, copy {at['copy_gb_s']:.1f} GB/s, {at['matmul_gflop_s']:,.0f}"
        f" GFLOP/s in {at['dtype']}, {at['threads']} threads"
    )


def _place(left: Mapping[str, Any]) -> str:
    words = [left["level"], left["geometry"], left["method"]]
    sizes = [
        f"{left[key]} {name}"
        for key, name in (("batch", "sequences"), ("visual_tokens", "visual tokens"))
        if left[key] is not None
    ]
    return ", ".join([*(word for word in words if word is not None), *sizes])


def _cell(value: Any, form: str, factor: float | None) -> str:
    return "–" if value is None else form.format(value if factor is None else value * factor)
