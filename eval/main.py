"""`kvcapsule eval`: capsules and training-free methods against the full cache, on the same questions, in one run."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from kvcapsule.atomic_files import to_json
from kvcapsule.capsule.write import update_metrics
from kvcapsule.cli.errors import complain
from kvcapsule.cli.options import instance, option_parser
from kvcapsule.cli.results import command_line, write_whole
from kvcapsule.cli.tables import report_console
from kvcapsule.errors import InputError

from .command_line import normal, on_purpose
from .config import EvalConfig
from .report import curves, markdown, scatter
from .report.rows import tables
from .run import run
from .suite.suite import load, name_of, shipped_suites

PROG = "kvcapsule eval"
_LISTS = {"--capsule": False, "--methods": True}
"""Options that may be given several times, and whether commas part what one of them is given."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        config = _parse(_normal(words))
        found = run(config, Console(stderr=True), command_line(PROG, words))
        report_console().print(*tables(found["rows"], _title(found)), sep="\n")
        _write(found, config)
    except (ArgumentError, ValueError) as error:
        if not on_purpose(error):
            raise
        return complain(PROG, error)
    return 0


def build_parser() -> ArgumentParser:
    """Every field of EvalConfig as an option, explained by its docstring."""
    return option_parser(
        EvalConfig,
        PROG,
        usage=(
            f"{PROG} [--capsule ID]... [--methods A,B --budget SHARE] [--suite NAME] [--model ID] [--json FILE] [--plot"
            " FILE] [options]"
        ),
        description=(
            "Compare capsules, policies at equal bytes and int4 with the full cache, on the same questions, in one"
            f" run. A suite ({', '.join(shipped_suites())}, or a file) compares many methods at many compression"
            " ratios."
        ),
    )


def _parse(words: list[str]) -> EvalConfig:
    """The options: those of the command line, then those of a suite, then defaults.

    Raises:
        InputError, ArgumentError: for options that there are not, or that have not such a value.
    """
    parser = build_parser()
    values = parser.parse_args(words)
    if values.suite is not None:
        try:
            options = parser.parse_object(load(values.suite).options, defaults=False)
        except ArgumentError as error:
            raise InputError(f"the suite {values.suite} cannot be used: options: {error}") from error
        parser.set_defaults(dict(options.items()))
        values = parser.parse_args(words)
    return instance(EvalConfig, parser, values)


def _normal(words: list[str]) -> list[str]:
    return normal(words, _LISTS)


def _write(found: dict[str, Any], config: EvalConfig) -> None:
    """The files that were asked for.

    Raises:
        InputError, CapsuleError: if one cannot be written.
    """
    try:
        if config.json is not None:
            write_whole(Path(config.json), to_json(found))
        if config.plot is not None:
            picture = scatter.picture if config.suite is None else curves.picture
            scatter.draw(picture(found["rows"], _title(found)), Path(config.plot))
        if config.suite is not None and config.report is not None:
            markdown.refresh(Path(config.report), name_of(config.suite), found, config.json, config.plot)
    except OSError as error:
        raise InputError(f"a result cannot be written: {error}") from error
    if config.save_metrics:
        update_metrics(config.capsule[0], {"eval": found})


def _title(found: dict[str, Any]) -> str:
    return f"{found['model']} on {found['data']['source']}, {found['rows'][0]['n']} questions"
