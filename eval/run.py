"""One run: from what was asked for to the object that docs/eval-json.md describes."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli.results import require_writable, shown_path
from kvcapsule.data import source
from kvcapsule.environment import machine, versions
from kvcapsule.errors import DataError, InputError
from kvcapsule.methods.method import Method
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm, require_device

from .batches import batches
from .config import EvalConfig
from .entries import FULL, RIVALS, Entry, build, chosen, entries, full_entry, open_capsules
from .equal_bytes import TOLERANCE, Build, match
from .quality import evaluate, prompt_bytes
from .report import markdown
from .report.rows import answer_tokens, rows
from .shared_prefill import replayable
from .suite.capsules import open_trained
from .suite.entries import Bench, Capsules
from .suite.suite import load
from .timing import time_entries
from .watched_generate import record

RUNS = Path("runs")
"""The folder of a suite's folder of capsules."""
SAMPLE = 32
"""Questions, the first of the run, on which bytes are matched."""


class Field(NamedTuple):
    """What takes part in a run."""

    capsules: list[Capsule]
    """All that are loaded."""
    entries: Callable[[PreTrainedModel, ProcessorMixin, datasets.Dataset, Progress], list[Entry]]
    """Makes the methods, once the capsules are on the model's device; the full cache is the first."""


def run(config: EvalConfig, console: Console, command: str) -> dict[str, Any]:
    """Measure everything and return the object that docs/eval-json.md describes.

    Args:
        config: see there.
        console: where progress is shown.
        command: the command line that the object names.

    Raises:
        InputError, CapsuleError, DataError, GeometryError, ModelError: for input that cannot be used; what is quick to
        check comes first.
    """
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    require_device(config.device)
    require_writable([config.json, config.plot, config.report])
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
            if entry.method is not None:
                entry.method.require_geometry(KVGeometry.from_config(model.config))
        shared = config.share_prefill and replayable(model)
        tallies = evaluate(
            model, processor, questions, taking_part, config.batch, config.max_new_tokens, progress, shared
        )
        timings = (
            time_entries(model, processor, questions, taking_part, config.batch, progress) if config.timing else {}
        )
    found = rows(taking_part, tallies, timings, model.dtype)
    _warn_unequal(found, console)
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


class Scales:
    """Measures what methods store of the first questions' prompts."""

    def __init__(
        self,
        config: EvalConfig,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        questions: datasets.Dataset,
        progress: Progress,
    ) -> None:
        self.model, self.progress = model, progress
        self._task: TaskID | None = None
        self._matched = 0
        self.layers = KVGeometry.from_config(model.config).layers
        first = questions.select(range(min(SAMPLE, len(questions))))
        # Read when they are first needed: not every run matches bytes.
        self._prompts = cache(lambda: list(batches(first, model, processor, config.batch)))
        shared = config.share_prefill and replayable(model)
        # With hidden states, as nobody knows yet which methods will be weighed.
        self._prefills = cache(
            lambda: [record(model, p.inputs, p.layout, hidden=True) for p in self._prompts()] if shared else []
        )

    def weigh(self, method: Method) -> int:
        return prompt_bytes(self.model, self._prompts(), method, self._prefills())

    def match(self, target: int, make: Build, name: str) -> Method:
        """What `make` makes, at the dial where it stores `target` bytes."""
        self._task, self._matched = self.progress.add_task("") if self._task is None else self._task, self._matched + 1
        self.progress.update(self._task, description=f"matching the bytes of {name}", total=self._matched)
        found = match(target, make, self.weigh, self.layers)
        self.progress.advance(self._task)
        return found


def _named(config: EvalConfig) -> Field:
    """The capsules and the policies that the options name."""
    capsules = open_capsules(config.capsule)
    names = chosen(config.methods, capsules)
    share = config.budget if config.ratio is None else config.ratio
    if share is None and not capsules and any(name in RIVALS for name in names):
        raise InputError(
            "give a --capsule whose bytes pruning is to match, or a --budget; or name --methods that need neither."
        )
    first = next(iter(capsules), None)

    def make(
        model: PreTrainedModel, processor: ProcessorMixin, questions: datasets.Dataset, progress: Progress
    ) -> list[Entry]:
        scales = Scales(config, model, processor, questions, progress)
        target = cache(lambda: scales.weigh(capsules[str(first)][1]))

        def turned(name: str) -> Method:
            if first is None:
                return build(name, {}, share)
            return scales.match(target(), lambda dial: build(name, {}, dial), name)

        return entries(names, capsules, turned, first)

    return Field([capsule for _, capsule in capsules.values()], make)


def _of_suite(config: EvalConfig, name: str, console: Console) -> Field:
    """The entries of a suite; capsules that are missing are trained now."""
    suite = load(name)
    specs = suite.chosen(config.methods)
    if config.report is not None:
        markdown.require_place(Path(config.report), suite.name)
    folder = RUNS / suite.name if config.suite_capsules is None else Path(config.suite_capsules)
    wanted = suite.capsules(specs)
    capsules: Capsules = {
        **{spec.name: (spec.place, Capsule.from_pretrained(spec.place)) for spec in wanted if spec.place is not None},
        **open_trained([spec for spec in wanted if spec.arguments], folder, config, console),
    }
    by_name = {spec.name: spec for spec in suite.specs}

    # Entries are made once the capsules are on the model's device, where a requantised one shares their parameters.
    def make(
        model: PreTrainedModel, processor: ProcessorMixin, questions: datasets.Dataset, progress: Progress
    ) -> list[Entry]:
        scales = Scales(config, model, processor, questions, progress)

        @cache
        def target(row: str) -> int:
            method = by_name[row].entry(bench).method
            assert method is not None
            return scales.weigh(method)

        bench = Bench(capsules, lambda row, made, name: scales.match(target(row), made, name))
        return [full_entry(), *(spec.entry(bench) for spec in specs)]

    return Field([capsule for _, capsule in capsules.values()], make)


def _warn_unequal(found: list[dict[str, Any]], console: Console) -> None:
    """Say so where whole tokens, or a sample that is unlike the whole, did not allow equal bytes."""
    by_name = {row["method"]: row["kv_bytes"] for row in found}
    for row in found:
        whole = by_name.get(row["settings"].get("matched_to"))
        if whole is not None and abs(row["kv_bytes"] / whole - 1) > TOLERANCE:
            console.print(
                f"{row['method']} stores {row['kv_bytes'] / whole:.1%} of the bytes of {row['settings']['matched_to']}."
            )


def _baseline(model: PreTrainedModel) -> str:
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return (
        f"transformers {transformers.__version__} DynamicCache read by the model's own {attention} attention, through"
        " generate"
    )
