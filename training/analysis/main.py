"""`kvcapsule analyze`: what to expect of compression on a model and on data, before any training."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from kvcapsule.atomic_files import to_json
from kvcapsule.cli.errors import complain
from kvcapsule.cli.options import instance, option_parser
from kvcapsule.cli.results import command_line, require_writable, write_whole
from kvcapsule.cli.tables import report_console
from kvcapsule.errors import DataError, GeometryError, InputError, ModelError

from .config import AnalyzeConfig
from .plot import draw
from .report import heading, tables
from .study import run

PROG = "kvcapsule analyze"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        config = instance(AnalyzeConfig, parser, parser.parse_args(words))
        require_writable([config.json], [config.plots])
        found = run(config, Console(stderr=True), command_line(PROG, words))
        try:
            _write(found, config)
        finally:
            _show(found)
    except (ArgumentError, DataError, GeometryError, InputError, ModelError) as error:
        return complain(PROG, error)
    return 0


def build_parser() -> ArgumentParser:
    """Every field of AnalyzeConfig as an option, explained by its docstring."""
    return option_parser(
        AnalyzeConfig,
        PROG,
        usage=f"{PROG} [--model ID_OR_PATH] [--tile N] [--questions N] [--json FILE] [--plots DIR] [options]",
        description=(
            "Study a frozen VLM's visual keys and values on some data, before any training: how alike tokens are, how"
            " many components hold their energy, how far attention drifts during the answer, the least error at given"
            " bits, and what one code for a stack of layers saves."
        ),
    )


def _write(found: dict[str, Any], config: AnalyzeConfig) -> None:
    if config.json is not None:
        write_whole(Path(config.json), to_json(found))
    if config.plots is not None:
        draw(found, Path(config.plots))


def _show(found: dict[str, Any]) -> None:
    console = report_console()
    console.print(heading(found))
    for table in tables(found):
        console.print("", table)
