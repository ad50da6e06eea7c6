"""`kvcapsule analyze`: the compression to expect for a model and a data set, before any training."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from kvcapsule.cli.errors import complain
from kvcapsule.cli.options import OptionParser, instance, option_parser
from kvcapsule.cli.results import STDOUT, command_line, require_writable, write_json
from kvcapsule.errors import KVCapsuleError

from .config import AnalyzeConfig

PROG = "kvcapsule analyze"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; 2, with one line on stderr, for unusable input."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        config = instance(AnalyzeConfig, parser, parser.read(words))
        require_writable([config.json], [config.plots])
        # --help and a mistyped option do not wait for torch.
        from rich.console import Console

        from .study import run

        result = run(config, Console(stderr=True), command_line(PROG, words))
        if config.json != STDOUT:
            _show(result, config.wide)
        write_json(config.json, result)
        if config.plots is not None:
            from .plot import draw

            draw(result, Path(config.plots))
    except (ArgumentError, KVCapsuleError) as error:
        return complain(PROG, error)
    return 0


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


def _show(result: dict[str, Any], wide: bool) -> None:
    from kvcapsule.cli.tables import print_report

    from .report import heading, tables

    print_report(heading(result), *tables(result), wide=wide)
