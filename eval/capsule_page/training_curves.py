"""The curves of the run that trained a capsule, from the log that lies beside it."""

import csv
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from kvcapsule.capsule.trained_with import RUN_SUFFIX

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
    closed form or one that was trained on another machine."""
    folder = capsule.resolve()
    path = folder.with_name(folder.name + RUN_SUFFIX) / LOG
    if not path.is_file():
        return []
    curves: dict[str, Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name in _NO_CURVES or name.startswith("validation") or not text:
                    continue
                if isfinite(value := float(text)):
                    curve = curves.setdefault(name, Curve(name, [], []))
                    curve.steps.append(int(row["step"]))
                    curve.values.append(value)
    return [curve for curve in curves.values() if len(curve.steps) > 1]
