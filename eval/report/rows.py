"""The rows of a run's JSON object (docs/eval-json.md), and the tables that `kvcapsule eval` prints of them."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import mean
from typing import Any

import torch

from kvcapsule.cli.tables import NAME, Column, ReportTable
from kvcapsule.methods.shown_names import shown_name

from ..entries import FULL, Entry
from ..quality import Tally
from ..timing import Timing

QUALITY = {
    "agreement": ("agreement", "{:.3f}"),
    "kl": ("KL", "{:.2g}"),
    "first_token_kl": ("KL, first", "{:.2g}"),
}
"""Keys of a row in the first table, after the accuracies: title and format."""
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
"""Keys of a row in the second table: title and format."""
_WIDE = ("kv_bytes", "parameter_bytes")
"""Those of the second table that are shown with --wide alone."""
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
    results = []
    for entry in entries:
        tally, timing = tallies[entry.name], timings.get(entry.name)
        results.append(
            {
                "method": entry.name,
                "family": entry.family,
                "settings": entry.settings,
                "accuracy": {task: mean(scores) for task, scores in tally.scores.items()},
                "agreement": tally.same / tally.count,
                "kl": _mean(tally.divergence, tally.positions),
                "first_token_kl": _mean(tally.first_divergence, tally.count),
                "reads_question": entry.method is not None and entry.method.reads_question,
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
    return results


def _mean(total: float, count: int) -> float | None:
    # JSON has no infinity, which is the KL where a method excludes a token that the full cache does not.
    return total / count if count and isfinite(total) else None


def answer_tokens(tally: Tally) -> dict[str, float]:
    """Mean tokens of an answer, the end token included, by task."""
    return {task: tally.tokens[task] / len(scores) for task, scores in tally.scores.items()}


def tables(results: Sequence[Mapping[str, Any]], title: str) -> list[ReportTable]:
    """Two tables for people: how good the methods' answers are, and their bytes and times."""
    tasks = list(results[0]["accuracy"])
    qualities = {key: column for key, column in QUALITY.items() if key != "first_token_kl" or asked_later(results)}
    # In a run at 16 bits the two compressions are the same number, and few methods store anything on the host.
    shown = {"compression16": is_wide(results), "host_kv_bytes": any(row.get("host_kv_bytes") for row in results)}
    costs = {key: column for key, column in COST.items() if shown.get(key, True)}
    method = Column("method", NAME)
    quality = ReportTable(
        [method, *map(Column, (*tasks, *(name for name, _ in qualities.values())))],
        title,
        unseen_question(results) or "",
    )
    cost = ReportTable([method, *(Column(name, wide=key in _WIDE) for key, (name, _) in costs.items())], _UNITS)
    for row in results:
        scores = [f"{row['accuracy'][task]:.3f}" for task in tasks]
        quality.add(
            shown_name(row["method"]), *scores, *(_cell(row[key], form) for key, (_, form) in qualities.items())
        )
        cost.add(shown_name(row["method"]), *(_cell(row[key], form) for key, (_, form) in costs.items()))
    return [quality, cost]


def asked_later(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether anything compressed was read for the first tokens of the answers."""
    # Results of earlier versions lack the key; null is an infinite KL.
    return any(row.get("first_token_kl", 0) != 0 for row in results)


def unseen_question(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Which rows rank tokens by a question that they did not see, as a sentence; None: none."""
    names = [shown_name(row["method"]) for row in results if row.get("reads_question")] if asked_later(results) else []
    return f"The ranking by the text behind the images has none to see here: {', '.join(names)}." if names else None


def is_wide(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the full cache of a run has elements of more than 16 bits, against which few bits look too good."""
    return any(row["compression16"] != row["compression"] for row in results)


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)
