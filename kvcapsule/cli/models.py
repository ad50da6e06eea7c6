"""`kvcapsule models`: every family that was looked at, whether it works, and how its visual spans are found.

All of it is the table in `kvcapsule.vlm.families`, which the tests build a model of every row of.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from ..vlm.families import FAMILIES, TRANSFORMERS, Family
from .errors import Parser

PROG = "kvcapsule models"
_WIDE = 190
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

    json: bool


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the JSON, and return 0."""
    options = _parser().parse_args(argv, namespace=Options())
    if options.json:
        print(json.dumps([{**asdict(family), "transformers": TRANSFORMERS} for family in FAMILIES], indent=2))
    else:
        _print_table(FAMILIES)
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
    print_table(table, _WIDE, f"tested with transformers {TRANSFORMERS}")


def _parser() -> Parser:
    parser = Parser(
        prog=PROG, description="List the model families, whether they work, and how their visual spans are found."
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of the table")
    return parser
