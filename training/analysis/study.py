"""Study: from an AnalyzeConfig to the JSON object that docs/analyze.md describes."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import isfinite
from typing import Any

from rich.console import Console

from kvcapsule.cli import session
from kvcapsule.cli.results import shown_path
from kvcapsule.data import source
from kvcapsule.environment import machine, versions
from kvcapsule.errors import DataError
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

from .config import LEAST_QUESTIONS, AnalyzeConfig
from .drift import KEPT, REFERENCES, TOP
from .layer import LayerStudy
from .passes import two_passes, whole_image
from .questions import Reader


def run(config: AnalyzeConfig, console: Console, command: str) -> dict[str, Any]:
    """Run the study and return the object that docs/analyze.md describes.

    Args:
        config: see there.
        console: where progress is shown.
        command: the command line that the object names.

    Raises:
        InputError, DataError, GeometryError, ModelError: for input that cannot be used; what is quick to check comes
            first.
    """
    session.begin(console, threads=config.threads, seed=config.seed, device=config.device)
    with console.status("loading the model and the questions"):
        model, processor = load_vlm(config.model, config.revision, config.dtype, config.device)
        geometry = KVGeometry.from_config(model.config)
        data = replace(config.data, size=min(config.data.size, config.questions))
        rows = source.load(data)
    if len(rows) < LEAST_QUESTIONS:
        raise DataError(
            f"{len(rows)} questions (of {data.source}, split {data.split!r}): a study needs at least {LEAST_QUESTIONS}."
        )
    session.tell(console, rows.info.description)
    reader = Reader(rows, model, processor, config.batch)
    tile = config.tile or whole_image(reader)
    layers, groups = two_passes(reader, tile, not config.tile, config.canonical_frame, console)
    return {
        "model": shown_path(config.model),
        "geometry": geometry.to_dict(),
        "data": {**asdict(data), "source": shown_path(data.source)},
        "versions": versions(),
        "seed": config.seed,
        "machine": machine(),
        "tile": tile,
        "layers": [_rounded(layer.result()) for layer in layers],
        "drift": _rounded(_drift(layers)),
        "predicted": [_rounded(entry) for layer in layers for entry in layer.predicted()],
        "stacks": [_rounded(entry) for group in groups for entry in group.predicted()],
        "questions": len(rows),
        "tiles": layers[0].count,
        "frame": "canonical" if layers[0].framed else "none",
        "revision": config.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "command": command,
    }


def _rounded(value: Any) -> Any:
    """Round all numbers to six digits; NaN, such as a mean over no pairs, becomes None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else None
    return value


def _drift(layers: Sequence[LayerStudy]) -> dict[str, Any]:
    """The entry "drift" of the object."""
    steps = layers[0].drift.steps
    return {
        "steps": list(range(steps)),
        "questions": layers[0].drift.questions[:steps].long().tolist(),
        "top": TOP,
        "kept": list(KEPT),
        "layers": [_layer_drift(layer) for layer in layers],
    }


def _layer_drift(layer: LayerStudy) -> dict[str, Any]:
    drift = layer.drift
    return {
        "layer": layer.layer,
        "visual_mass": drift.curve("visual_mass").tolist(),
        "overlap": {name: drift.curve("overlap", name, TOP).tolist() for name in REFERENCES},
        "held": {name: [drift.curve("held", name, kept).tolist() for kept in KEPT] for name in (*REFERENCES, "best")},
    }
