"""What a finished training run prints: its errors, in words too, what the capsule stores, and what to do next."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvcapsule.capsule.read import METRICS_FILE, WEIGHTS_FILE
from kvcapsule.checkpoints import shipped
from kvcapsule.cli.sizes import shown_bytes
from kvcapsule.cli.tables import Column, ReportTable

from .stored_size import StoredSize

_YARDSTICKS = ("pages-vlm-cross-layer", "pages-vlm-kvcapsule")
"""Shipped capsules that others are compared with: one that changes hardly an answer, one that changes some."""
_ALIKE = 1.5
"""Times an error that is as good as another."""


class Yardstick(NamedTuple):
    """A capsule whose error and answers are both known."""

    name: str
    output_error: float
    same_answers: float
    """Share of answers that equal the full cache's, in [0, 1]."""


def errors_table(metrics: Mapping[str, Any]) -> ReportTable:
    """What each layer loses on held-out questions, and their mean."""
    columns = [*map(Column, ("layer", "keys\nunexplained", "values\nunexplained", "attention\noutput error"))]
    table = ReportTable(columns, title=f"on {metrics['questions']} held-out questions")
    names = ("keys_unexplained", "values_unexplained", "output_error")
    layers = sorted({int(k.split("/")[0].removeprefix("layer")) for k in metrics if k.startswith("layer")})
    for title, under in (*((str(i), f"layer{i}/") for i in layers), ("mean", "")):
        table.add(title, *(f"{metrics[under + n]:.4f}" if under + n in metrics else "–" for n in names))
    return table


def yardsticks() -> list[Yardstick]:
    """The shipped capsules that a new one is compared with, the better one first."""
    known = []
    for name in _YARDSTICKS:
        folder = shipped(name)
        assert folder is not None
        metrics = json.loads((folder / METRICS_FILE).read_bytes())
        family = name.removeprefix("pages-vlm-")
        rows = {row["method"]: row for row in metrics["eval"]["rows"]}
        known.append(Yardstick(name, metrics["train"]["output_error"], rows[family]["agreement"]))
    return known


def verdict(output_error: float) -> str:
    """Whether an error of attention's output is good, by what such errors did to the answers of shipped capsules."""
    good, fair = yardsticks()
    word = "good" if output_error <= _ALIKE * good.output_error else ""
    word = word or ("fair" if output_error <= _ALIKE * fair.output_error else "poor")
    advice = {"good": "", "fair": "", "poor": " Store more (a lower --compression), or train on more questions."}[word]
    known = "; ".join(
        f"{y.name}: {y.output_error:.4f}, {y.same_answers:.1%} of answers unchanged" for y in (good, fair)
    )
    return f"An output error of {output_error:.4f} is {word} ({known}).{advice}"


def summary(output: Path, metrics: Mapping[str, Any], size: StoredSize) -> list[str]:
    """The lines below the table.

    Args:
        output: folder of the saved capsule.
        metrics: of the run.
        size: what the capsule stores.
    """
    weights = (output / WEIGHTS_FILE).stat().st_size
    image = f"{size.stored // size.images:,} of {size.full // size.images:,} bytes an image"
    return [
        "Unexplained: the share of the variance of keys or values that the capsule does not give back, 0 at best; keys"
        " that no query reads may stay unexplained. The attention output error, of what queries read, tells more.",
        verdict(metrics["output_error"]),
        f"capsule saved to {output} ({metrics['seconds']:.0f} s): {shown_bytes(weights)} of weights, stores"
        f" {size.compression:.1f}x less than a cache of 16 bits ({image}).",
        f"next: kvcapsule eval --capsule {shlex.quote(str(output))}",
    ]
