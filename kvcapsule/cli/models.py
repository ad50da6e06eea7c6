"""`kvcapsule models`: the model families that work and those that are refused, and how visual spans are found.

It prints the table in `kvcapsule.vlm.families`; the tests build a model for every row of it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from ..errors import KVCapsuleError
from ..vlm.families import FAMILIES, TRANSFORMERS, Family
from .errors import Parser, complain
from .results import STDOUT, add_json_option, require_writable, write_json

PROG = "kvcapsule models"
_TABLE_WIDTH = 190
"""Columns of a table that is not printed to a terminal."""
_COLUMNS = ("family", "model type", "status", "positions", "a span is", "span boundary", "tested with", "note")
_POSITIONS = {
    "none": "none",
    "1d": "1-D RoPE",
    "mrope": "M-RoPE, sections",
    "mrope-interleaved": "M-RoPE, interleaved",
    "": "",
}


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    json: str | None


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the JSON, and return the exit code."""
    options = _parser().read(argv, Options())
    try:
        require_writable([options.json])
        if options.json != STDOUT:
            _print_table(FAMILIES)
        write_json(options.json, [{**asdict(family), "transformers": TRANSFORMERS} for family in FAMILIES])
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def _print_table(families: Sequence[Family]) -> None:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    from .tables import print_table

    table = Table(
        *(Column(title, no_wrap=title != "note") for title in _COLUMNS),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for family in families:
        spans = ", ".join(kind for kind in (family.span, family.video) if kind)
        lists = ["\n".join(dict.fromkeys(names)) for names in (family.model_types, family.classes)]
        row = [
            family.name,
            lists[0],
            family.status,
            _POSITIONS[family.positions],
            spans,
            family.span_boundary,
            lists[1],
            family.note,
        ]
        table.add_row(*row)
    print_table(table, _TABLE_WIDTH, f"tested with transformers {TRANSFORMERS}")


def _parser() -> Parser:
    parser = Parser(
        prog=PROG, description="List the model families, whether they work, and how their visual spans are found."
    )
    add_json_option(parser)
    return parser
