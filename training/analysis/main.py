"""`kvcapsule analyze`: the compression to expect for a model and a data set, before any training."""

from pathlib import Path
from typing import Any

from kvcapsule.cli.measuring import MeasuringCommand
from kvcapsule.cli.options import OptionParser, instance, option_parser
from kvcapsule.cli.results import require_writable

from .config import AnalyzeConfig

PROG = "kvcapsule analyze"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; 2, with one line on stderr, for unusable input."""
    return MeasuringCommand(PROG, _parse, _measure, _show, _write).main(argv)


def build_parser() -> OptionParser:
    """Every field of AnalyzeConfig as an option, explained by its docstring."""
    return option_parser(
        AnalyzeConfig,
        PROG,
        usage=f"{PROG} [--model ID_OR_PATH] [--tile N] [--questions N] [--json FILE] [--plots DIR] [options]",
        description=(
            "Study a frozen VLM's visual keys and values on some data, before any training: how similar tokens are, how"
            " many components hold their energy, how far attention drifts during the answer, the least error at given"
            " bits, and how many bits one code for a layer group saves."
        ),
    )


def _parse(words: list[str]) -> AnalyzeConfig:
    parser = build_parser()
    config = instance(AnalyzeConfig, parser, parser.read(words))
    require_writable([config.json], [config.plots])
    return config


def _measure(config: AnalyzeConfig, command: str) -> dict[str, Any]:
    from rich.console import Console

    from .study import run

    return run(config, Console(stderr=True), command)


def _show(result: dict[str, Any], config: AnalyzeConfig) -> None:
    from kvcapsule.cli.tables import print_report

    from .report import heading, tables

    print_report(heading(result), *tables(result), wide=config.wide)


def _write(result: dict[str, Any], config: AnalyzeConfig) -> None:
    """Draw the figures where they are wanted."""
    if config.plots is not None:
        from .plot import draw

        draw(result, Path(config.plots))
