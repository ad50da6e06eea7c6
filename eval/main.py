"""`kvcapsule eval`: capsules and training-free methods against the full cache, on the same questions, in one run."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from kvcapsule.cli.measuring import MeasuringCommand
from kvcapsule.cli.options import OptionParser, instance, option_parser, require_current
from kvcapsule.cli.results import json_file
from kvcapsule.errors import InputError, KVCapsuleError

from .eval_config import RENAMED, EvalConfig
from .report.title import title_of
from .suite.shipped import name_of, shipped_suites

PROG = "kvcapsule eval"
_LISTS = {"capsule": False, "methods": True}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    return MeasuringCommand(PROG, _parse, _measure, _show, _write).main(argv)


def build_parser() -> OptionParser:
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
            f" run. A suite ({', '.join(shipped_suites())}, or a YAML file) compares many methods at many compression"
            " ratios."
        ),
        lists=_LISTS,
        renamed=RENAMED,
    )


def _parse(words: list[str]) -> EvalConfig:
    """The options: those of the command line, then those of a suite or what a capsule was trained with, then defaults.

    Raises:
        ConfigError, InputError, ArgumentError: for unknown options, or values that they cannot have.
    """
    parser = build_parser()
    values = parser.read(words)
    if values.suite is not None:
        from .suite.suite import load

        suite = load(values.suite)
        try:
            require_current(suite.options, RENAMED)
            options = parser.parse_object(suite.options, defaults=False)
        except (ArgumentError, KVCapsuleError) as error:
            raise InputError(f"the suite {values.suite} cannot be used: options: {error}") from error
        parser.set_defaults(dict(options.items()))
        values = parser.read(words)
    config = instance(EvalConfig, parser, values)
    if not config.capsule:
        return config
    from .capsule_defaults import set_defaults

    # What is wrong with the options themselves was said before a capsule is looked for.
    set_defaults(parser, words, config.capsule[0])
    return instance(EvalConfig, parser, parser.read(words))


def _measure(config: EvalConfig, command: str) -> dict[str, Any]:
    from rich.console import Console

    from .run import run

    return run(config, Console(stderr=True), command)


def _show(result: dict[str, Any], config: EvalConfig) -> None:
    from kvcapsule.cli.tables import print_report

    from .report.rows import tables

    print_report(*tables(result["rows"], title_of(result)), wide=config.wide)


def _write(result: dict[str, Any], config: EvalConfig) -> None:
    """Write the picture, the report and the capsule's metrics where they are wanted.

    Raises:
        InputError, CapsuleError: if one cannot be written.
    """
    from .report import markdown
    from .report.picture import save_picture
    from .report.redraw import picture_of

    try:
        if config.plot is not None:
            save_picture(picture_of(result), Path(config.plot))
        if config.suite is not None and config.report is not None:
            markdown.refresh(Path(config.report), name_of(config.suite), result, json_file(config.json), config.plot)
    except OSError as error:
        raise InputError(f"a result cannot be written: {error}") from error
    if config.save_metrics:
        from kvcapsule.capsule.write import update_metrics

        update_metrics(config.capsule[0], {"eval": result})
