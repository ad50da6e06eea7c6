"""Answers and first tokens with an image store, against the capsule without one and the full cache:
`python -m kvcapsule.eval.studies.image_store`.

With a store a question reads the image through the capsule, where without one its prefill reads the image raw. Measured
are accuracy, the share of answers that equal the full cache's and those of the capsule without a store, and the time to
the first token, of which each method has its turn at each question.
"""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, cast

import torch
from rich.console import Console
from transformers import PreTrainedModel

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli import session
from kvcapsule.cli.progress import tracked
from kvcapsule.cli.results import shown_path
from kvcapsule.cli.tables import NAME, Column, ReportTable, print_report
from kvcapsule.data import source
from kvcapsule.data.batches import read_question
from kvcapsule.data.prompts import encode
from kvcapsule.data.source import SourceConfig
from kvcapsule.environment import machine, versions
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.store.image_store import ImageStore
from kvcapsule.vlm.loading import load_vlm

from ..scores.scorer import Scorer
from .command import Study

PROG = "python -m kvcapsule.eval.studies.image_store"
METHODS = ("full", "capsule", "store, image new", "store, image known")
_ROOM = 10**9
_GREEDY = {"do_sample": False}


@dataclass(frozen=True)
class StoreConfig:
    """What is measured, and where the result is written."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    capsule: str = "pages-vlm-cross-layer"
    """The capsule."""
    questions: int = 96
    """Questions of the test split of pages, asked one by one."""
    max_new_tokens: int = 96
    """Most tokens of an answer."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    json: str | None = None
    """File for the result as JSON; - prints it in place of the table."""

    def __post_init__(self) -> None:
        for name in ("questions", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: at least 1 is needed.")


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table or the JSON, and return the exit code."""
    return Study(
        PROG,
        StoreConfig,
        usage="[--capsule NAME] [--questions N] [--json FILE]",
        description="Measure answers and first tokens with an image store.",
        measure=lambda config, command: run(config, Console(stderr=True), command),
        show=_print,
    ).main(argv)


def run(config: StoreConfig, console: Console, command: str) -> dict[str, Any]:
    """Ask all questions with each method, and return the measurements."""
    session.begin(console, threads=config.threads, seed=0, device=None)
    model, processor = load_vlm(config.model)
    capsule = Capsule.from_pretrained(config.capsule).to(model.device)
    data = SourceConfig(split="test", size=config.questions)
    table = source.load(data)
    answers: dict[str, list[str]] = {name: [] for name in METHODS}
    scores: dict[str, list[float]] = {name: [] for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for index in tracked(range(len(table)), "questions", len(table), console):
        question = read_question(table[index], index)
        inputs = encode(processor, [question.conversation()], model.dtype).to(model.device)
        store = ImageStore(None, max_bytes=_ROOM)
        for name in METHODS:
            with _block(model, capsule, name, store):
                tokens, _ = _generate(model, inputs, config.max_new_tokens)
                # The time is that of another call: the first one of a block also reads the model's weights.
                if name == METHODS[2]:
                    store.prune(0)
                seconds[name].append(_generate(model, inputs, 1)[1])
            text = processor.decode(tokens, skip_special_tokens=True)
            answers[name].append(text)
            scores[name].append(Scorer().score(question, text).value)

    def same(name: str, other: str) -> float:
        return sum(a == b for a, b in zip(answers[name], answers[other], strict=True)) / len(table)

    rows = [
        {
            "method": name,
            "accuracy": sum(scores[name]) / len(table),
            "same_as_full": same(name, METHODS[0]),
            "same_as_capsule": same(name, METHODS[1]),
            "first_token_s": median(seconds[name]),
        }
        for name in METHODS
    ]
    return {
        "model": shown_path(config.model),
        "capsule": shown_path(config.capsule),
        "data": asdict(data),
        "versions": versions(),
        "machine": machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": rows,
        "command": command,
    }


def _block(model: PreTrainedModel, capsule: Capsule, name: str, store: ImageStore) -> AbstractContextManager[Any]:
    """A block in which the model generates with a method."""
    if name == METHODS[0]:
        return nullcontext()
    return attach(model, capsule, store if name in METHODS[2:] else None)


def _generate(model: PreTrainedModel, inputs: Any, count: int) -> tuple[torch.Tensor, float]:
    """The answer's tokens, and the seconds that it took."""
    begin = time.perf_counter()
    output = cast("Any", model).generate(**inputs, max_new_tokens=count, **_GREEDY)
    return output[0, inputs["input_ids"].shape[1] :], time.perf_counter() - begin


def _print(result: dict[str, Any]) -> None:
    titles = ("accuracy", "same as full", "same as capsule", "first token, ms")
    of = f"{result['data']['size']} questions of the test split of {result['data']['source']}"
    table = ReportTable([Column("method", NAME), *map(Column, titles)], note=of)
    for row in result["rows"]:
        shares = [f"{row[name]:.3f}" for name in ("accuracy", "same_as_full", "same_as_capsule")]
        table.add(row["method"], *shares, f"{1000 * row['first_token_s']:.1f}")
    print_report(table)


if __name__ == "__main__":
    sys.exit(main())
