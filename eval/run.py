"""One run of `kvcapsule eval`: from its options to the object that docs/eval-json.md describes."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import transformers
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli import session
from kvcapsule.cli.model_check import checked_models
from kvcapsule.cli.progress import Stages
from kvcapsule.cli.results import require_writable, shown_path
from kvcapsule.data import source
from kvcapsule.environment import machine, versions
from kvcapsule.errors import DataError, InputError
from kvcapsule.methods.method import Method
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

from .block import Block
from .entries import FULL, RIVALS, Entry, build, chosen, entries, full_entry, open_capsules
from .equal_bytes import TOLERANCE, Build, match
from .eval_config import EvalConfig
from .protocols import PROTOCOLS
from .quality import Answering, evaluate, prompt_bytes
from .report import markdown
from .report.rows import answer_tokens, rows
from .scores.scorer import Scorer
from .seen import seen_shares
from .shared_prefill import replayable
from .suite.capsules import open_trained
from .suite.entries import Capsules, EntryContext
from .suite.suite import load
from .timing import time_entries

RUNS = Path("runs")
"""The folder of a suite's folder of capsules."""
SAMPLE = 32
"""Questions, the first of the run, on which bytes are matched."""


class Participants(NamedTuple):
    """The capsules and methods of a run."""

    capsules: Capsules
    """Loaded, on the CPU: by row or entry, the name and the capsule."""
    entries: Callable[[PreTrainedModel, ProcessorMixin, datasets.Dataset, Progress], list[Entry]]
    """Builds the methods, once the capsules are on the model's device; the full cache is the first."""


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
    session.begin(console, threads=config.threads, seed=config.seed, device=config.device)
    require_writable([config.json, config.plot, config.report])
    participants = named(config) if config.suite is None else _of_suite(config, config.suite, console)
    with console.status("loading the model and the questions"):
        model, processor = load_vlm(config.model, config.revision, config.dtype, config.device, config.resize)
        for _, capsule in participants.capsules.values():
            capsule.require_geometry(KVGeometry.from_config(model.config))
            capsule.to(model.device)
        questions = source.load(config.data)
    if len(questions) == 0:
        raise DataError(f"{config.data.source} (split {config.data.split!r}) holds no questions.")
    shares = seen_shares(participants.capsules, questions, config.allow_seen, console)
    session.tell(console, questions.info.description)
    with (
        checked_models(participants.capsules.values(), model, config.strict, console),
        Stages(console) as progress,
    ):
        methods = participants.entries(model, processor, questions, progress)
        for entry in methods:
            if entry.method is not None:
                entry.method.require_geometry(KVGeometry.from_config(model.config))
        shared = config.share_prefill and replayable(model)
        scorer = Scorer(config.metric, config.data.source)
        answering = Answering(config.batch, config.max_new_tokens, scorer, shared, config.protocol)
        tallies = evaluate(model, processor, questions, methods, answering, progress)
        timings = time_entries(model, processor, questions, methods, answering, progress) if config.timing else {}
    results = rows(methods, tallies, timings, model.dtype)
    _warn_unequal(results, console)
    return {
        "model": shown_path(config.model),
        "data": {**asdict(config.data), "source": shown_path(config.data.source)},
        "versions": versions(),
        "seed": config.seed,
        "machine": machine(),
        "rows": results,
        "baseline": _baseline(model),
        "command": command,
        "revision": config.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": config.batch,
        "max_new_tokens": config.max_new_tokens,
        "protocol": config.protocol,
        "metric": ", ".join(sorted(tallies[FULL].metrics)),
        "answer_tokens": answer_tokens(tallies[FULL]),
        "seen": shares,
    }


class ByteMeter:
    """Measures what methods store of the first questions' prompts, and matches methods to each other's bytes."""

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
        blocks, shared = PROTOCOLS[config.protocol].blocks, config.share_prefill and replayable(model)

        @cache
        def sample() -> list[Block]:
            """Read when it is first needed: not every run matches bytes."""
            read: list[Block] = list(blocks(first, model, processor, config.batch, progress))
            for block in read if shared else []:
                # With hidden states: which methods will be measured is not known yet.
                block.record(model, hidden=True)
            return read

        self._sample = sample

    def measure(self, method: Method) -> int:
        return prompt_bytes(self.model, self._sample(), method)

    def match(self, target: int, build: Build, name: str) -> Method:
        """The method of `build` at the share of tokens with which it stores `target` bytes; `name` is for the
        screen."""
        self._task, self._matched = self.progress.add_task("") if self._task is None else self._task, self._matched + 1
        self.progress.update(self._task, description=f"matching the bytes of {name}", total=self._matched)
        method = match(target, build, self.measure, self.layers)
        self.progress.advance(self._task)
        return method


def named(config: EvalConfig) -> Participants:
    """The capsules and the policies that the options name."""
    capsules = open_capsules(config.capsule)
    names = chosen(config.methods, capsules)
    if config.budget is None and not capsules and any(name in RIVALS for name in names):
        raise InputError(
            "give a --capsule whose bytes pruning is to match, or a --budget; or name --methods that need neither."
        )
    first = next(iter(capsules), None)

    def build_all(
        model: PreTrainedModel, processor: ProcessorMixin, questions: datasets.Dataset, progress: Progress
    ) -> list[Entry]:
        meter = ByteMeter(config, model, processor, questions, progress)
        target = cache(lambda: meter.measure(capsules[str(first)][1]))

        def build_policy(name: str) -> Method:
            if first is None:
                return build(name, {}, config.budget)
            return meter.match(target(), lambda share: build(name, {}, share), name)

        return entries(names, capsules, build_policy, first)

    return Participants(capsules, build_all)


def _of_suite(config: EvalConfig, name: str, console: Console) -> Participants:
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

    # Entries are built once the capsules are on the model's device, where a requantised one shares their parameters.
    def build_all(
        model: PreTrainedModel, processor: ProcessorMixin, questions: datasets.Dataset, progress: Progress
    ) -> list[Entry]:
        meter = ByteMeter(config, model, processor, questions, progress)

        @cache
        def target(row: str) -> int:
            method = by_name[row].entry(context).method
            assert method is not None
            return meter.measure(method)

        context = EntryContext(capsules, lambda row, build, name: meter.match(target(row), build, name))
        return [full_entry(), *(spec.entry(context) for spec in specs)]

    return Participants(capsules, build_all)


def _warn_unequal(results: list[dict[str, Any]], console: Console) -> None:
    """Name the rows whose bytes are not those that they were matched to: a method keeps whole tokens, and the sample
    may differ from all questions."""
    by_name = {row["method"]: row["kv_bytes"] for row in results}
    for row in results:
        target = by_name.get(row["settings"].get("matched_to"))
        if target is not None and abs(row["kv_bytes"] / target - 1) > TOLERANCE:
            console.print(
                f"{row['method']} stores {row['kv_bytes'] / target:.1%} of the bytes of"
                f" {row['settings']['matched_to']}."
            )


def _baseline(model: PreTrainedModel) -> str:
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return (
        f"transformers {transformers.__version__} DynamicCache read by the model's own {attention} attention, through"
        " generate"
    )
