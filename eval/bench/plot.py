"""Serving within a memory budget as a picture: for each model, the largest batch and the tokens a second of every
method."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .contenders import BASELINES

_FULL, _METHOD = "#888888", "#009e73"
"""Of Okabe and Ito's palette, which colour-blind readers can tell apart."""
_PANELS = (("batch", "sequences that fit", "{:,}"), ("tokens_s", "tokens/s at that batch", "{:,.0f}"))


def picture(rows: Sequence[Mapping[str, Any]], where: str) -> Figure:
    """Two panels of bars a model. `where`: the machine, for the title."""
    models = list(dict.fromkeys(row["geometry"] for row in rows))
    figure = Figure(figsize=(9.0, 0.8 + 2.9 * len(models)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for place, model in enumerate(models):
        here = [row for row in rows if row["geometry"] == model]
        names = [row["method"] for row in here]
        for panel, (key, title, form) in enumerate(_PANELS):
            axes = figure.add_subplot(len(models), len(_PANELS), place * len(_PANELS) + panel + 1)
            values = [row[key] for row in here]
            bars = axes.barh(names, values, color=[_FULL if name in BASELINES else _METHOD for name in names])
            axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.2 * max(values))
            axes.set_title(f"{model}: {title}, {here[0]['budget_mib']:g} MiB of cache", loc="left", fontsize=9)
            axes.tick_params(labelsize=8, labelleft=panel == 0)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(where, fontsize=8, color="#555555")
    return figure
