"""Loss against bytes, the picture of a suite: one line a kind of method, through all its compression ratios.

Bytes are those of visual tokens, or where methods also differ in what they store of the text, those of all tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from kvcapsule.methods.shown_names import shown_name

from ..entries import FULL
from .loss_panels import Series, panels
from .picture import LOOKS, other_looks

_QUANTIZED = "quantized"
"""The policy whose widths in bits are points of one line, that of its family."""


def axis(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What the picture sets losses against: a key of the rows, and its words."""
    both = any({"text", "budget", "matched_to"} & set(row["settings"]) for row in rows)
    return ("kv_bytes", "visual and text KV") if both else ("visual_kv_bytes", "visual KV")


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """The rows but the full cache's, by family; of policies of one family, each has a line of its own."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != FULL:
            policy = row["settings"].get("policy", _QUANTIZED)
            kinds.setdefault(row["family"] if policy == _QUANTIZED else policy, []).append(row)
    result: list[Series] = []
    key, others = axis(rows)[0], other_looks()
    for name, members in kinds.items():
        base, _, more = name.partition("+")
        marker, colour = LOOKS[base] if base in LOOKS else next(others)
        while any((marker, colour, bool(more)) == (line.marker, line.colour, line.combined) for line in result):
            marker = next(others)[0]
        label = shown_name(name if len(members) > 1 else members[0]["method"])
        result.append(Series(label, sorted(members, key=lambda row: row[key]), marker, colour, bool(more)))
    return result


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """One line a kind of method, named in a legend."""
    full = next(row for row in rows if row["method"] == FULL)
    return panels(curves(rows), full, title, *axis(rows))
