"""`kvcapsule bench`: attention over segments, decode steps, generation and serving, against the full cache."""

from pathlib import Path
from typing import Any

from kvcapsule.cli.measuring import MeasuringCommand
from kvcapsule.cli.options import OptionParser, instance, option_parser
from kvcapsule.cli.results import json_file
from kvcapsule.errors import InputError

from .bench_config import LEVELS, QUICK, BenchConfig

PROG = "kvcapsule bench"
_LISTS = {name: True for name in ("level", "geometry", "visual_tokens", "batch", "methods", "model", "images")}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    return MeasuringCommand(PROG, parse, _measure, _show, _write).main(argv)


def build_parser() -> OptionParser:
    """Every field of BenchConfig as an option, explained by its docstring."""
    return option_parser(
        BenchConfig,
        PROG,
        usage=f"{PROG} [--level {'|'.join(LEVELS)}] [--quick] [--json FILE] [--plot FILE] [options]",
        description=(
            "Measure time and bytes of attention over segments against in-place full attention, of decode steps and"
            " generation against transformers' caches, and of serving within a memory limit. A method whose output is"
            " wrong is not timed."
        ),
        lists=_LISTS,
    )


def parse(words: list[str]) -> BenchConfig:
    """The options: those of the command line, then those of a quick run if it is one, then defaults.

    Raises:
        ConfigError, ArgumentError: for unknown options, or values that they cannot have.
    """
    parser = build_parser()
    values = parser.read(words)
    if values.quick:
        parser.set_defaults(QUICK)
        values = parser.read(words)
    return instance(BenchConfig, parser, values)


def _measure(config: BenchConfig, command: str) -> dict[str, Any]:
    from rich.console import Console

    from .run import run

    return run(config, Console(stderr=True), command)


def _show(result: dict[str, Any], config: BenchConfig) -> None:
    from kvcapsule.cli.tables import print_report

    from .level_tables import tables

    print_report(*tables(result), wide=config.wide)


def _write(result: dict[str, Any], config: BenchConfig) -> None:
    """Write the picture and the report where they are wanted.

    Raises:
        InputError: if one cannot be written.
    """
    from ..report.picture import save_picture
    from . import bench_page
    from .serving_plot import picture

    try:
        if config.plot is not None:
            served = [row for row in result["rows"] if row["level"] == "serving"]
            if not served:
                raise InputError(
                    f"--plot {config.plot}: nothing to draw, as not one sequence fits into --memory-mib"
                    f" {config.memory_mib:g}."
                )
            save_picture(picture(served, bench_page.machine_of(result)), Path(config.plot))
        if config.report is not None:
            json = json_file(config.json)
            bench_page.refresh(Path(config.report), result, config.level, json, config.plot)
    except OSError as error:
        raise InputError(f"a result cannot be written: {error}") from error
