"""`kvcapsule bench`: attention over segments, decode steps, generation and serving, against the full cache."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from kvcapsule.atomic_files import to_json
from kvcapsule.cli.errors import complain
from kvcapsule.cli.options import instance, option_parser
from kvcapsule.cli.results import command_line, write_whole
from kvcapsule.cli.tables import report_console
from kvcapsule.errors import InputError

from ..command_line import normal, on_purpose
from ..report.scatter import draw
from . import markdown
from .config import LEVELS, QUICK, BenchConfig
from .plot import picture
from .report import tables
from .run import run

PROG = "kvcapsule bench"
_LISTS = {f"--{name}": True for name in ("level", "geometry", "visual_tokens", "batch", "methods", "model", "images")}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        config = parse(words)
        found = run(config, Console(stderr=True), command_line(PROG, words))
        report_console().print(*tables(found), sep="\n")
        _write(found, config)
    except (ArgumentError, ValueError) as error:
        if not on_purpose(error):
            raise
        return complain(PROG, error)
    return 0


def build_parser() -> ArgumentParser:
    """Every field of BenchConfig as an option, explained by its docstring."""
    return option_parser(
        BenchConfig,
        PROG,
        usage=f"{PROG} [--level {'|'.join(LEVELS)}] [--quick true] [--json FILE] [--plot FILE] [options]",
        description=(
            "Time and bytes of attention over segments against in-place full attention, of decode steps and generation"
            " against transformers' caches, and of serving within a memory budget. What gives wrong outputs is not"
            " timed."
        ),
    )


def parse(words: list[str]) -> BenchConfig:
    """The options: those of the command line, then those of a quick run if it is one, then defaults.

    Raises:
        InputError, ArgumentError: for options that there are not, or that have not such a value.
    """
    words = [f"{word}=true" if word == "--quick" and _is_last(words[i + 1 :]) else word for i, word in enumerate(words)]
    words = normal(words, _LISTS)
    parser = build_parser()
    values = parser.parse_args(words)
    if values.quick:
        parser.set_defaults(QUICK)
        values = parser.parse_args(words)
    return instance(BenchConfig, parser, values)


def _is_last(rest: list[str]) -> bool:
    """Whether nothing that could be an option's value follows: a bare --quick is what people type."""
    return not rest or rest[0].startswith("--")


def _write(found: dict[str, Any], config: BenchConfig) -> None:
    """The files that were asked for.

    Raises:
        InputError: if one cannot be written.
    """
    try:
        if config.json is not None:
            write_whole(Path(config.json), to_json(found))
        if config.plot is not None:
            served = [row for row in found["rows"] if row["level"] == "serving"]
            if not served:
                raise InputError(
                    f"--plot {config.plot}: nothing to draw, as not one sequence fits into --memory_mib"
                    f" {config.memory_mib:g}."
                )
            draw(picture(served, markdown.place(found)), Path(config.plot))
        if config.report is not None:
            markdown.refresh(Path(config.report), found, config.level, config.json, config.plot)
    except OSError as error:
        raise InputError(f"a result cannot be written: {error}") from error
