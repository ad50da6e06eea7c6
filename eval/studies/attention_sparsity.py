"""How sparse each layer's post-vision attention is, which is what VL-Cache shares its budget by: `python -m
kvcapsule.eval.studies.attention_sparsity`."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvcapsule.atomic_files import to_json
from kvcapsule.cli.errors import complain
from kvcapsule.cli.results import command_line, require_writable, shown_path, write_whole
from kvcapsule.data import source
from kvcapsule.data.source import SourceConfig
from kvcapsule.environment import machine, versions
from kvcapsule.errors import DataError, GeometryError, InputError, ModelError
from kvcapsule.inference.attach import attach
from kvcapsule.policy.postvision import THRESHOLD, SparsityMeter
from kvcapsule.vlm.loading import load_vlm

from ..batches import batches

PROG = "python -m kvcapsule.eval.studies.attention_sparsity"


@dataclass(frozen=True)
class SparsityConfig:
    """What is measured, and where the result goes."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    threshold: float = THRESHOLD
    """An entry counts as zero below this share of its query's greatest."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(split="test", size=200))
    """Where the questions come from."""
    batch: int = 16
    """Questions that are prefilled together."""
    json: str | None = None
    """File for the result as JSON."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise InputError(f"--threshold {self.threshold}: a share of a query's greatest entry lies between 0 and 1.")
        if self.batch < 1:
            raise InputError(f"--batch {self.batch}: at least 1 is needed.")


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the file that was asked for, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        config = auto_cli(SparsityConfig, args=words, as_positional=False)
        require_writable([config.json])
        found = run(config, Console(stderr=True), command_line(PROG, words))
        if config.json is not None:
            write_whole(Path(config.json), to_json(found))
    except (InputError, DataError, GeometryError, ModelError) as error:
        return complain(PROG, error)
    table = Table("layer", "mean", "least", "greatest", title=f"sparsity of {found['model']}, {found['n']} questions")
    for row in found["rows"]:
        table.add_row(str(row["layer"]), *(f"{row[name]:.3f}" for name in ("mean", "least", "greatest")))
    Console(highlight=False).print(table)
    return 0


def run(config: SparsityConfig, console: Console, command: str) -> dict[str, Any]:
    """Prefill every question; a row for each full-attention layer: mean, least and greatest sparsity over the
    questions."""
    model, processor = load_vlm(config.model)
    asked = source.load(config.data)
    meter = SparsityMeter(config.threshold)
    seen: dict[int, list[torch.Tensor]] = {}
    with attach(model, meter):
        steps = -(-len(asked) // config.batch)
        for batch in track(batches(asked, model, processor, config.batch), "questions", total=steps, console=console):
            cast("Any", model).generate(**batch.inputs, max_new_tokens=1, do_sample=False)
            for layer, sparsity in meter.sparsity.items():
                seen.setdefault(layer, []).append(sparsity.double().cpu())
    rows = []
    for layer, parts in sorted(seen.items()):
        all_ = torch.cat(parts)
        rows.append(
            {"layer": layer, "mean": float(all_.mean()), "least": float(all_.min()), "greatest": float(all_.max())}
        )
    return {
        "model": shown_path(config.model),
        "data": {**asdict(config.data), "source": shown_path(config.data.source)},
        "threshold": config.threshold,
        "n": len(asked),
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
        "command": command,
    }


if __name__ == "__main__":
    sys.exit(main())
