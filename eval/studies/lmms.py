"""The same questions asked by lmms-eval, its own code, and by `kvcapsule eval`: `python -m kvcapsule.eval.studies.lmms`
compares their answers one by one. It needs lmms-eval (`make test-lmms` sets up an environment with it).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
from lmms_eval.utils import load_yaml_config
from rich.console import Console

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli import session
from kvcapsule.cli.progress import Stages
from kvcapsule.cli.results import shown_path
from kvcapsule.cli.tables import NAME, Column, ReportTable, print_report
from kvcapsule.data.source import SourceConfig
from kvcapsule.environment import machine, versions
from kvcapsule.errors import ConfigError, InputError
from kvcapsule.vlm.loading import load_vlm

from ..entries import FULL, Entry
from ..lmms.arguments import ModelArguments
from ..lmms.questions import TASKS, draw, scores
from ..lmms.words import read_words
from ..quality import Answering, evaluate
from ..shared_prefill import replayable
from .command import Study

PROG = "python -m kvcapsule.eval.studies.lmms"
PACKAGE = "lmms_eval"


@dataclass(frozen=True)
class LmmsConfig:
    """What is compared, and where the result is written."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    methods: str = "full capsule=pages-vlm-cross-layer policy=int4 policy=snapkv,budget=0.1"
    """The methods, each as in `lmms-eval --model_args`, separated by spaces; the first is full."""
    task: str = "kvcapsule_pages"
    """A task of one source: kvcapsule_pages or kvcapsule_pictures."""
    limit: int | None = None
    """Ask the first so many questions of the task. Default: all."""
    dtype: str = "float32"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    batch: int = 16
    """Questions that are answered together."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    json: str | None = None
    """File for the result as JSON; - prints it in place of the table."""

    def __post_init__(self) -> None:
        if self.methods.split()[:1] != [FULL]:
            raise ConfigError(f"--methods {self.methods!r}: the first is {FULL}, which the others are compared with.")
        for name, count in (("batch", self.batch), ("limit", self.limit), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ConfigError(f"--{name} {count}: at least 1 is needed.")
        if not self.plan.is_file():
            raise ConfigError(f"--task {self.task}: kvcapsule_pages or kvcapsule_pictures is needed.")

    @property
    def plan(self) -> Path:
        """The file that says what the task draws."""
        return TASKS / f"{self.task.removeprefix('kvcapsule_')}.jsonl"


class Answers(NamedTuple):
    """Of one method, in the order of the questions."""

    texts: list[str]
    scores: list[float]
    visual_kv_bytes: float
    """Mean over the questions."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table or the JSON, write the file, and return the exit code."""
    return Study(
        PROG,
        LmmsConfig,
        usage="[--model ID] [--methods WORDS] [--task NAME] [--limit N] [--json FILE]",
        description="Ask the same questions through lmms-eval and through kvcapsule eval, and compare the answers.",
        measure=lambda config, command: run(config, Console(stderr=True), command),
        show=lambda result: print_report(_table(result)),
    ).main(argv)


def run(config: LmmsConfig, console: Console, command: str) -> dict[str, Any]:
    """Ask all questions on both sides; a row for each method.

    Raises:
        ConfigError, DataError, ModelError: for options that cannot be used.
        InputError: if lmms-eval ends with an error.
    """
    session.begin(console, threads=config.threads, seed=0, device=None)
    plan = json.loads(config.plan.read_text(encoding="utf-8"))
    questions = draw(datasets.Dataset.from_list([plan]))
    questions = questions.select(range(min(config.limit or len(questions), len(questions))))
    ours = _ours(config, questions, console)
    rows = []
    for method, mine in ours.items():
        with console.status(f"lmms-eval: {method}") if console.is_terminal else nullcontext():
            theirs = _theirs(config, method, len(questions))
        rows.append(
            {
                "method": method,
                "n": len(questions),
                "accuracy": {"eval": _mean(mine.scores), "lmms": _mean(theirs.scores)},
                "same_answers": _equal(mine.texts, theirs.texts),
                "same_scores": _equal(mine.scores, theirs.scores),
                "visual_kv_bytes": {"eval": mine.visual_kv_bytes, "lmms": theirs.visual_kv_bytes},
            }
        )
    return {
        "model": shown_path(config.model),
        "task": config.task,
        "data": asdict(SourceConfig(**plan)),
        "dtype": config.dtype,
        "batch": config.batch,
        "max_new_tokens": _max_new_tokens(config),
        "rows": rows,
        "seed": 0,
        "versions": {**versions(), **{name: version(name) for name in ("lmms-eval", "torchvision")}},
        "machine": machine(),
        "command": command,
    }


def _ours(config: LmmsConfig, questions: datasets.Dataset, console: Console) -> dict[str, Answers]:
    """By method, as `kvcapsule eval` asks them."""
    model, processor = load_vlm(config.model, dtype=config.dtype)
    entries = []
    for word in config.methods.split():
        method = ModelArguments.of(read_words(_arguments(config, word), {})).method()
        if isinstance(method, Capsule):
            method.to(model.device)
        entries.append(Entry(word, method, word))
    with Stages(console) as progress:
        answering = Answering(config.batch, _max_new_tokens(config), share_prefill=replayable(model))
        tallies = evaluate(model, processor, questions, entries, answering, progress)
    return {
        name: Answers(
            [answer.strip() for answer in tally.answers],
            [scores(row, [answer])["accuracy"] for row, answer in zip(questions, tally.answers, strict=True)],
            tally.visual / tally.count,
        )
        for name, tally in tallies.items()
    }


def _theirs(config: LmmsConfig, method: str, count: int) -> Answers:
    """As lmms-eval asks them, in a process of its own."""
    with TemporaryDirectory() as folder:
        words = [sys.executable, "-m", PACKAGE, "--model", "kvcapsule", "--model_args", _arguments(config, method)]
        words += ["--tasks", config.task, "--include_path", str(TASKS), "--batch_size", str(config.batch)]
        words += ["--limit", str(count), "--output_path", folder, "--log_samples"]
        threads = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **threads})
        samples = list(Path(folder).rglob(f"*_samples_{config.task}.jsonl"))
        if done.returncode != 0 or len(samples) != 1:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise InputError(f"lmms-eval ended with an error ({method}): {' '.join(last)}")
        rows = [json.loads(line) for line in samples[0].read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: int(row["doc_id"]))
    return Answers(
        [row["filtered_resps"].strip() for row in rows],
        [row["accuracy"] for row in rows],
        _mean([row["token_counts"][0]["visual_kv_bytes"] for row in rows]),
    )


def _arguments(config: LmmsConfig, method: str) -> str:
    return f"pretrained={config.model},dtype={config.dtype}" + ("" if method == FULL else f",{method}")


def _max_new_tokens(config: LmmsConfig) -> int:
    settings: dict[str, Any] = load_yaml_config(str(TASKS / f"{config.task}.yaml"))["generation_kwargs"]
    return int(settings["max_new_tokens"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _equal(mine: Sequence[object], theirs: Sequence[object]) -> int:
    return sum(a == b for a, b in zip(mine, theirs, strict=True))


def _table(result: dict[str, Any]) -> ReportTable:
    table = ReportTable(
        [Column("method", NAME), *map(Column, ("kvcapsule eval", "lmms-eval", "same answers", "of"))],
        title=f"accuracy of {result['model']}",
    )
    for row in result["rows"]:
        accuracies = (f"{row['accuracy'][side]:.5f}" for side in ("eval", "lmms"))
        table.add(row["method"], *accuracies, str(row["same_answers"]), str(row["n"]))
    return table


if __name__ == "__main__":
    sys.exit(main())
