"""Sparsity of each layer's post-vision attention, the measure by which VL-Cache shares its budget among the layers.

`python -m kvcapsule.eval.studies.attention_sparsity` prints it."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from rich.console import Console

from kvcapsule.cli import session
from kvcapsule.cli.progress import tracked
from kvcapsule.cli.results import shown_path
from kvcapsule.cli.tables import NAME, Column, ReportTable, print_report
from kvcapsule.data import source
from kvcapsule.data.source import SourceConfig
from kvcapsule.environment import machine, versions
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.policy.vl_cache import THRESHOLD, SparsityMeter
from kvcapsule.vlm.loading import load_vlm

from ..batches import batches
from .command import Study

PROG = "python -m kvcapsule.eval.studies.attention_sparsity"


@dataclass(frozen=True)
class SparsityConfig:
    """What is measured, and where the result is written."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    threshold: float = THRESHOLD
    """A probability counts as zero if it is below this share of the greatest one of its query."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(split="test", size=200))
    """The questions."""
    batch: int = 16
    """Questions that are prefilled together."""
    json: str | None = None
    """File for the result as JSON; - prints it in place of the table."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"--threshold {self.threshold}: it is a share between 0 and 1.")
        if self.batch < 1:
            raise ConfigError(f"--batch {self.batch}: at least 1 is needed.")


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table or the JSON, write the file, and return the exit code."""
    return Study(
        PROG,
        SparsityConfig,
        usage="[--model ID] [--data.source DATA] [--json FILE]",
        description="Measure how sparse the attention of a prompt's last queries to its tokens is, layer by layer.",
        measure=lambda config, command: run(config, Console(stderr=True), command),
        show=lambda result: print_report(_table(result)),
    ).main(argv)


def _table(result: dict[str, Any]) -> ReportTable:
    title = f"sparsity of {result['model']}, {result['n']} questions"
    table = ReportTable([Column("layer", NAME), *map(Column, ("mean", "least", "greatest"))], title)
    for row in result["rows"]:
        table.add(str(row["layer"]), *(f"{row[name]:.3f}" for name in ("mean", "least", "greatest")))
    return table


def run(config: SparsityConfig, console: Console, command: str) -> dict[str, Any]:
    """Prefill every question; a row for each layer with full attention has the mean, least and greatest sparsity over
    the questions."""
    session.begin(console, threads=None, seed=0, device=None)
    model, processor = load_vlm(config.model)
    questions = source.load(config.data)
    session.tell(console, questions.info.description)
    meter = SparsityMeter(config.threshold)
    sparsities: dict[int, list[torch.Tensor]] = {}
    with attach(model, meter):
        steps, prompts = -(-len(questions) // config.batch), batches(questions, model, processor, config.batch)
        for batch in tracked(prompts, "questions", steps, console):
            cast("Any", model).generate(**batch.inputs, max_new_tokens=1, do_sample=False)
            for layer, sparsity in meter.sparsity.items():
                sparsities.setdefault(layer, []).append(sparsity.double().cpu())
    rows = []
    for layer, parts in sorted(sparsities.items()):
        all_ = torch.cat(parts)
        rows.append(
            {"layer": layer, "mean": float(all_.mean()), "least": float(all_.min()), "greatest": float(all_.max())}
        )
    return {
        "model": shown_path(config.model),
        "data": {**asdict(config.data), "source": shown_path(config.data.source)},
        "threshold": config.threshold,
        "n": len(questions),
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
        "command": command,
    }


if __name__ == "__main__":
    sys.exit(main())
