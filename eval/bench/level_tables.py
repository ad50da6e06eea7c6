"""The tables that `kvcapsule bench` prints: for each level one for each setting, with a row for each method."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from kvcapsule.cli.tables import NUMBER, TEXT, Column, ReportTable

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
"""The columns of each level's table: key of the row, title and format. Seconds are shown in ms."""
_SETTING = {
    "operator": ("geometry", "visual_tokens", "batch"),
    "encode": ("geometry", "visual_tokens"),
    "step": ("geometry", "batch"),
    "end-to-end": ("geometry", "batch"),
    "serving": ("geometry", "budget_mib"),
}
"""Of these columns, those that are in the title: methods are compared within their values."""
_IN_TITLE = {"geometry": "{}", "visual_tokens": "{:,} visual tokens", "batch": "batch {}", "budget_mib": "{:g} MiB"}
_WIDE = {
    "operator": ("traffic_bytes", "iqr_seconds", "bandwidth_fraction"),
    "encode": ("iqr_seconds",),
    "step": ("bytes", "iqr_seconds", "bandwidth_fraction"),
    "end-to-end": ("ttft_overhead", "bytes", "peak_bytes"),
    "serving": ("bytes",),
}
"""Of these columns, those that are shown with --wide alone."""
_MS = ("seconds", "iqr_seconds", "ttft_seconds")


def tables(result: Mapping[str, Any]) -> list[ReportTable | str]:
    """The tables, the machine's ceilings, and what was left out."""
    parts: list[ReportTable | str] = []
    for level, setting in _SETTING.items():
        rows = [row for row in result["rows"] if row["level"] == level]
        for values, group in groupby(rows, itemgetter(*setting)):
            title = ", ".join(_IN_TITLE[key].format(value) for key, value in zip(setting, values, strict=True))
            parts.append(_table(level, f"{level}: {title}", list(group)))
    parts.append(ceilings(result))
    parts += [f"{_subject(left)}: {left['reason']}" for left in result["skipped"]]
    return parts


def _table(level: str, title: str, rows: Sequence[Mapping[str, Any]]) -> ReportTable:
    """The rows of one setting."""
    keys = [key for key in COLUMNS[level] if key not in _SETTING[level]]
    columns = [
        Column(COLUMNS[level][key][0], TEXT if key == "method" else NUMBER, wide=key in _WIDE[level]) for key in keys
    ]
    table = ReportTable(columns, title)
    for line in cells(rows, level):
        table.add(*(cell for key, cell in zip(COLUMNS[level], line, strict=True) if key in keys))
    return table


def cells(rows: Sequence[Mapping[str, Any]], level: str) -> list[list[str]]:
    """The cells of a level's table, row by row; the baseline's method is marked."""
    shown = []
    for row in rows:
        line = [_cell(row[key], form, 1e3 if key in _MS else None) for key, (_, form) in COLUMNS[level].items()]
        column = list(COLUMNS[level]).index("method")
        if row["method"] == row["baseline"]:
            line[column] += " (baseline)"
        if row["failed"] is not None:
            line[column] += f" ({row['failed']})"
        shown.append(line)
    return shown


def ceilings(result: Mapping[str, Any]) -> str:
    """The line about the machine's ceilings."""
    limit = result["ceilings"]
    return (
        f"ceilings: read {limit['read_gb_s']:.1f} GB/s, copy {limit['copy_gb_s']:.1f} GB/s,"
        f" {limit['matmul_gflop_s']:,.0f} GFLOP/s in {limit['dtype']}, {limit['threads']} threads"
    )


def _subject(left: Mapping[str, Any]) -> str:
    words = [left["level"], left["geometry"], left["method"]]
    sizes = [
        f"{left[key]} {name}"
        for key, name in (("batch", "sequences"), ("visual_tokens", "visual tokens"))
        if left[key] is not None
    ]
    return ", ".join([*(word for word in words if word is not None), *sizes])


def _cell(value: Any, form: str, factor: float | None) -> str:
    return "–" if value is None else form.format(value if factor is None else value * factor)
