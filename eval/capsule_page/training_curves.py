"""The curves of the run that trained a capsule, from the log that lies beside it."""

import csv
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from kvcapsule.capsule.trained_with import RUN_SUFFIX
from kvcapsule.errors import InputError

LOG = Path("csv") / "metrics.csv"
"""Below OUTPUT.run."""
_NO_CURVES = ("step", "epoch")


class Curve(NamedTuple):
    """A number by step of the descent."""

    name: str
    steps: list[int]
    values: list[float]


def training_curves(capsule: Path) -> list[Curve]:
    """The curves of a capsule's training, in the order of the log; empty where there is no log, as for a capsule in
    closed form or one that was trained on another machine.

    Raises:
        InputError: if the log is damaged.
    """
    folder = capsule.resolve()
    path = folder.with_name(folder.name + RUN_SUFFIX) / LOG
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            curves = _curves(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"the log {path} cannot be read ({error}): delete it, and the page has no curves.") from error
    return [curve for curve in curves if len(curve.steps) > 1]


def _curves(rows: "csv.DictReader[str]") -> Iterable[Curve]:
    """One for each number of the log. Raises ValueError for a damaged row."""
    curves: dict[str, Curve] = {}
    for row in rows:
        if None in row or not row.get("step"):
            raise ValueError(f"line {rows.line_num} is no row of it")
        for name, text in row.items():
            if name in _NO_CURVES or name.startswith("validation") or not text:
                continue
            if isfinite(value := float(text)):
                curve = curves.setdefault(name, Curve(name, [], []))
                curve.steps.append(int(row["step"]))
                curve.values.append(value)
    return curves.values()
