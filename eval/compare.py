"""One run: from what was asked for to the object that docs/eval-json.md describes."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.capsule import Capsule
from kvcapsule.cli.errors import InputError
from kvcapsule.data import source
from kvcapsule.data.source import DataError
from kvcapsule.geometry import KVGeometry, full_attention_layers
from kvcapsule.machine import machine, versions
from kvcapsule.models import load_vlm

from . import results
from .config import EvalConfig
from .matching import TOLERANCE, match_ratios
from .methods import FULL, RIVALS, Entry, chosen, entries, full_entry, open_capsules, shown_path
from .report import answer_tokens, rows
from .runner import evaluate, survey
from .suite import load
from .timing import time_entries
from .trained import open_trained

RUNS = Path("runs")
"""The folder of a suite's folder of capsules."""


class Field(NamedTuple):
    """What takes part in a run."""

    capsules: list[Capsule]
    """All that are loaded."""
    entries: Callable[[PreTrainedModel, ProcessorMixin, datasets.Dataset, Progress], list[Entry]]
    """Makes the methods, once the capsules are on the model's device; the full cache is the first."""
    matched: str | None = None
    """The row whose bytes pruning is given."""


def run(config: EvalConfig, console: Console, command: str) -> dict[str, Any]:
    """Measure everything and return the object that docs/eval-json.md describes.

    Args:
        config: see there.
        console: where progress is shown.
        command: the command line that the object names.

    Raises:
        InputError, CapsuleError, DataError, GeometryError, ModelError: for input that cannot be used; what is quick to check comes first.
    """
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    _require_device(config.device)
    _require_writable([path for path in (config.json, config.plot, config.report) if path is not None])
    field = _named(config) if config.suite is None else _of_suite(config, config.suite, console)
    with console.status("loading the model and the questions"):
        model, processor = load_vlm(config.model, config.revision, config.dtype, config.device, config.resize)
        for capsule in field.capsules:
            capsule.require_geometry(KVGeometry.from_config(model.config))
            capsule.to(model.device)
        questions = source.load(config.data)
    if len(questions) == 0:
        raise DataError(f"{config.data.source} (split {config.data.split!r}) holds no questions.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        taking_part = field.entries(model, processor, questions, progress)
        for entry in taking_part:
            # A policy may have to know the number of layers.
            if (learn := getattr(entry.method, "require_geometry", None)) is not None:
                learn(KVGeometry.from_config(model.config))
        tallies = evaluate(model, processor, questions, taking_part, config.batch, config.max_new_tokens, progress)
        timings = time_entries(model, processor, questions, taking_part, config.batch, progress) if config.timing else {}
    found = rows(taking_part, tallies, timings, model.dtype)
    _warn_unequal(found, field.matched, console)
    return {
        "model": shown_path(config.model),
        "data": {**asdict(config.data), "source": shown_path(config.data.source)},
        "versions": versions(),
        "seed": config.seed,
        "machine": machine(),
        "rows": found,
        "baseline": _baseline(model),
        "command": command,
        "revision": config.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": config.batch,
        "max_new_tokens": config.max_new_tokens,
        "answer_tokens": answer_tokens(tallies[FULL]),
    }


def _named(config: EvalConfig) -> Field:
    """The capsules and the policies that the options name."""
    capsules = open_capsules(config.capsule)
    names = chosen(config.methods, capsules)
    if config.ratio is None and not capsules and any(name in RIVALS for name in names):
        raise InputError("give a --capsule whose bytes pruning is to match, or a --ratio; or name --methods that need neither.")
    first = next(iter(capsules), None)

    def make(model: PreTrainedModel, processor: ProcessorMixin, questions: datasets.Dataset, progress: Progress) -> list[Entry]:
        ratios: tuple[float, ...] = ()
        if any(name in RIVALS for name in names):
            ratios = _ratios(config, model, processor, questions, None if first is None else capsules[first][1], progress)
        return entries(names, capsules, ratios, first)

    return Field([capsule for _, capsule in capsules.values()], make, first)


def _of_suite(config: EvalConfig, name: str, console: Console) -> Field:
    """The entries of a suite; capsules that are missing are trained now."""
    suite = load(name)
    specs = suite.chosen(config.methods)
    if config.report is not None:
        results.require_place(Path(config.report), suite.name)
    folder = RUNS / suite.name if config.suite_capsules is None else Path(config.suite_capsules)
    capsules = open_trained(suite.capsules(specs), folder, config, console)
    # Entries are made once the capsules are on the model's device, where a requantised one shares their parameters.
    return Field([capsule for _, capsule in capsules.values()], lambda *_: [full_entry(), *(spec.entry(capsules) for spec in specs)])


def _ratios(
    config: EvalConfig,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: datasets.Dataset,
    capsule: Capsule | None,
    progress: Progress,
) -> tuple[float, ...]:
    """The retention ratios of pruning, layer by layer."""
    geometry = KVGeometry.from_config(model.config)
    if capsule is None:
        assert config.ratio is not None
        return (config.ratio,) * geometry.layers
    surveyed = survey(model, processor, questions, capsule, config.batch, progress)
    return match_ratios(surveyed.visual, surveyed.layouts, geometry, full_attention_layers(model.config), model.dtype)


def _warn_unequal(found: list[dict[str, Any]], capsule: str | None, console: Console) -> None:
    """Say so where whole tokens did not allow equal bytes."""
    by_name = {row["method"]: row["visual_kv_bytes"] for row in found}
    if capsule is None or capsule not in by_name:
        return
    for name in RIVALS:
        if name in by_name and abs(by_name[name] / by_name[capsule] - 1) > TOLERANCE:
            console.print(f"{name} stores {by_name[name] / by_name[capsule]:.1%} of the capsule's visual bytes: it keeps whole tokens.")


def _baseline(model: PreTrainedModel) -> str:
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return f"transformers {transformers.__version__} DynamicCache read by the model's own {attention} attention, through generate"


def _require_device(device: str | None) -> None:
    if device in (None, "auto"):
        return
    try:
        torch.empty(0, device=device)
    # A build of torch without CUDA answers with an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _require_writable(paths: list[str]) -> None:
    """Make the folders of the results now: a result that has nowhere to go costs the whole run."""
    for path in map(Path, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"{path} cannot be written: it is a folder, or lies in one that is read-only.")
