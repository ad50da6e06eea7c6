"""`kvcapsule analyze`: the compression to expect for a model and a data set, before any training."""

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
    """Run the command and return its exit code; 2, with one line on stderr, for unusable input."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        config = instance(AnalyzeConfig, parser, parser.parse_args(words))
        require_writable([config.json], [config.plots])
        result = run(config, Console(stderr=True), command_line(PROG, words))
        try:
            _write(result, config)
        finally:
            _show(result)
    except (ArgumentError, DataError, GeometryError, InputError, ModelError) as error:
        return complain(PROG, error)
    return 0


def build_parser() -> ArgumentParser:
    """Parser with one option per field of AnalyzeConfig; the help texts are its docstrings."""
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


def _write(result: dict[str, Any], config: AnalyzeConfig) -> None:
    if config.json is not None:
        write_whole(Path(config.json), to_json(result))
    if config.plots is not None:
        draw(result, Path(config.plots))


def _show(result: dict[str, Any]) -> None:
    console = report_console()
    console.print(heading(result))
    for table in tables(result):
        console.print("", table)
