"""`kvcapsule analyze`: what to expect of compression on a model and on data, before any training."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from rich.console import Console

from kvcapsule.cli.errors import InputError, complain
from kvcapsule.cli.results import command_line, require_writable, write_whole
from kvcapsule.data.source import DataError
from kvcapsule.files import to_json
from kvcapsule.geometry import GeometryError
from kvcapsule.models import ModelError

from .config import AnalyzeConfig
from .plot import draw
from .report import heading, tables
from .study import run

PROG = "kvcapsule analyze"
_WIDE = 160
"""Columns of a table that is not printed to a terminal."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        values = parser.parse_args(words)
        values.pop("config", None)
        config = AnalyzeConfig(**vars(parser.instantiate(values)))
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
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [--model ID_OR_PATH] [--tile N] [--questions N] [--json FILE] [--plots DIR] [options]",
        description="Study a frozen VLM's visual keys and values on some data, before any training: how alike tokens are, how many "
        "components hold their energy, how far attention drifts during the answer, and the least error at given bits.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_class_arguments(AnalyzeConfig, None)
    return parser


def _write(found: dict[str, Any], config: AnalyzeConfig) -> None:
    if config.json is not None:
        write_whole(Path(config.json), to_json(found))
    if config.plots is not None:
        draw(found, Path(config.plots))


def _show(found: dict[str, Any]) -> None:
    # A file has no edge to wrap at.
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    console.print(heading(found))
    for table in tables(found):
        console.print("", table)
