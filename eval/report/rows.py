"""A run as a JSON object (docs/eval-json.md) and as a table."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import mean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..entries import FULL, Entry
from ..quality import Tally
from ..timing import Timing

QUALITY = {
    "agreement": ("agreement", "{:.3f}"),
    "kl": ("KL", "{:.2g}"),
}
"""Keys of a row beside its accuracies: title and format in the table."""
COST = {
    "visual_kv_bytes": ("visual KV", "{:,}"),
    "compression": ("compr.", "{:.2f}x"),
    "compression16": ("of 16-bit", "{:.2f}x"),
    "kv_bytes": ("all KV", "{:,}"),
    "host_kv_bytes": ("on host", "{:,}"),
    "parameter_bytes": ("params", "{:,}"),
    "prefill_ratio": ("prefill", "{:.2f}"),
    "tokens_per_s_ratio": ("tok/s", "{:.2f}"),
}
"""Keys of a row in the second table."""
_UNITS = "bytes a question (params: in all); prefill time, tokens/s: full cache = 1"


def rows(
    entries: Sequence[Entry], tallies: Mapping[str, Tally], timings: Mapping[str, Timing], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The rows of the object.

    Args:
        entries: the full cache among them.
        tallies: by name of the entry.
        timings: likewise; times are None for entries that were not timed.
        dtype: of the full cache's keys and values.
    """
    full = tallies[FULL]
    found = []
    for entry in entries:
        tally, timing = tallies[entry.name], timings.get(entry.name)
        found.append(
            {
                "method": entry.name,
                "family": entry.family,
                "settings": entry.settings,
                "accuracy": {task: mean(scores) for task, scores in tally.scores.items()},
                "agreement": tally.same / tally.count,
                # JSON has no infinity, which the KL is where a method rules out what the full cache does not.
                "kl": tally.divergence / tally.positions if tally.positions and isfinite(tally.divergence) else None,
                "visual_kv_bytes": round(tally.visual / tally.count),
                "kv_bytes": round(tally.total / tally.count),
                "host_kv_bytes": round(tally.host / tally.count),
                "parameter_bytes": tally.parameters,
                "compression": full.visual / tally.visual,
                "compression16": full.visual * 2 / dtype.itemsize / tally.visual,
                "prefill_ratio": timing and timing.prefill_ratio,
                "tokens_per_s_ratio": timing and timing.tokens_per_s_ratio,
                "n": tally.count,
            }
        )
    return found


def answer_tokens(tally: Tally) -> dict[str, float]:
    """Mean tokens of an answer, the end token included, by task."""
    return {task: tally.tokens[task] / len(scores) for task, scores in tally.scores.items()}


def tables(found: Sequence[Mapping[str, Any]], title: str) -> list[Table]:
    """The rows as a person reads them: what the methods are good for, and what they cost."""
    tasks = list(found[0]["accuracy"])
    # In a run at 16 bits the two compressions are the same number, and few methods keep anything on the host.
    shown = {"compression16": is_wide(found), "host_kv_bytes": any(row.get("host_kv_bytes") for row in found)}
    costs = {key: column for key, column in COST.items() if shown.get(key, True)}
    quality, cost = (
        _table(title, [*tasks, *(name for name, _ in QUALITY.values())]),
        _table(_UNITS, [name for name, _ in costs.values()]),
    )
    for row in found:
        scores = [f"{row['accuracy'][task]:.3f}" for task in tasks]
        quality.add_row(row["method"], *scores, *(_cell(row[key], form) for key, (_, form) in QUALITY.items()))
        cost.add_row(row["method"], *(_cell(row[key], form) for key, (_, form) in costs.items()))
    return [quality, cost]


def is_wide(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the full cache of a run has elements of more than 16 bits, so that `compression` alone would flatter
    few-bit rows."""
    return any(row["compression16"] != row["compression"] for row in found)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)
