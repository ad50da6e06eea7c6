"""Training curves of smol-vlm as one table and one picture: `python -m kvcapsule.training.testbeds.smol_vlm.curves
--help`."""

import csv
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvcapsule.atomic_files import replacing
from kvcapsule.cli.results import require_writable, write_whole
from kvcapsule.errors import InputError

from .turns import TASKS

STAGES = ("names", "connector", "lora")
_SINGLE = ("loss", "named", "empty")
"""Logged names besides the tasks."""


@dataclass
class CurvesConfig:
    """Options: the training's logs, and the output files."""

    work: str
    """`--work` of the training run, with Lightning's logs."""
    log: str
    """CSV file for all stages."""
    plot: str
    """PNG file for the picture."""


def rows_of(work: Path) -> list[dict[str, str]]:
    """All logged rows, stage by stage; for a step that was run again after a restart, the last row.

    Raises:
        InputError: if nothing was logged.
    """
    rows: list[dict[str, str]] = []
    for stage in STAGES:
        by_step: dict[int, dict[str, str]] = {}
        versions = sorted(
            (work / stage / "log").glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])
        )
        for path in versions:
            fresh: dict[int, dict[str, str]] = {}
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    fresh.setdefault(int(row["step"]), {}).update({name: value for name, value in row.items() if value})
            if fresh:
                by_step = {step: row for step, row in by_step.items() if step < min(fresh)} | fresh
        rows += [{"stage": stage, **by_step[step]} for step in sorted(by_step)]
    if not rows:
        raise InputError(f"{work} has no logs of {', '.join(STAGES)}: name the --work of a training.")
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """The rows as CSV, with four significant digits."""
    names = [*_SINGLE, *(task for task in TASKS if any(task in row for row in rows))]
    lines = [["stage", "step", *names]]
    for row in rows:
        lines.append([row["stage"], row["step"], *(f"{float(row[name]):.4g}" if name in row else "" for name in names)])
    return "".join(",".join(line) + "\n" for line in lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Plot by step the share of visual tokens named correctly, and the share of correct answers by task, with the last
    two stages in one panel."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    naming, reading = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    named = [(int(row["step"]), float(row["named"])) for row in rows if row["stage"] == "names" and "named" in row]
    naming.plot(*zip(*named, strict=True) if named else ([], []), color="#0072b2", label="of what is shown")
    naming.set(title="visual tokens named", xlabel="step of the names", ylabel="right")
    last = max((int(row["step"]) for row in rows if row["stage"] == "connector"), default=-1) + 1
    for task in TASKS:
        seen = [(int(row["step"]) + last * (row["stage"] == "lora"), float(row[task])) for row in rows if task in row]
        if seen:
            reading.plot(*zip(*seen, strict=True), marker="o", markersize=3, label=task)
    reading.axvline(last, color="#999999", linestyle=":", linewidth=1)
    reading.set(
        title="answers, in training",
        xlabel="step of the connector, and behind the line of connector and LoRA",
        ylim=(0, 1),
    )
    reading.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes in (naming, reading):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def main(config: CurvesConfig) -> None:
    """Read the logs, and write the table and the picture.

    Raises:
        InputError: if there is nothing to read, or a file cannot be written.
    """
    require_writable([config.log, config.plot])
    rows = rows_of(Path(config.work))
    write_whole(Path(config.log), table(rows).encode())
    draw(rows, Path(config.plot))


if __name__ == "__main__":
    try:
        main(auto_cli(CurvesConfig, as_positional=False))
    except InputError as error:
        raise SystemExit(f"no curves: {error}") from error
