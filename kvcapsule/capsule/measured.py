"""What measurements of a capsule must be, to be shown: those in its metrics.json, and the JSON of `kvcapsule eval`."""

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import shortened

_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "family": (str,),
    "settings": (dict,),
    "accuracy": (dict,),
    "agreement": _NUMBER,
    "visual_kv_bytes": _NUMBER,
    "compression": _NUMBER,
    "n": (int,),
}
"""Types of a row's values (docs/eval-json.md); those that a row lacks are shown as unknown, and so is null."""
ROW_KEYS = tuple(_KINDS)
"""What a page about a capsule needs of each row."""


def training_fault(training: Any) -> str | None:
    """What is wrong with the numbers of a training run; None: nothing."""
    if not isinstance(training, Mapping):
        return f"train is {shortened(repr(training))}, expected names and numbers"
    for name, value in training.items():
        if value is not None and not isinstance(value, _NUMBER):
            return f"train.{name} is {shortened(repr(value))}, expected a number"
    return None


def evaluation_fault(evaluation: Any, needed: Collection[str] = ()) -> str | None:
    """What is wrong with the object of an evaluation; None: nothing.

    Args:
        evaluation: the object that docs/eval-json.md describes.
        needed: keys that each row must have, with a value.
    """
    rows = evaluation.get("rows", []) if isinstance(evaluation, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        return "it has no rows of methods"
    if not isinstance(evaluation.get("data") or {}, Mapping):
        return f"data is {shortened(repr(evaluation['data']))}, expected names and values"
    for number, row in enumerate(rows, start=1):
        for name, kinds in _KINDS.items():
            value = row.get(name)
            if value is None and name in needed:
                return f"row {number} has no {name}"
            if value is not None and not isinstance(value, kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                return f"{name} of row {number} is {shortened(repr(value))}, expected {expected}"
        for task, score in (row.get("accuracy") or {}).items():
            if score is not None and not isinstance(score, _NUMBER):
                return f"the accuracy {task} of row {number} is {shortened(repr(score))}, expected a number"
    return None
