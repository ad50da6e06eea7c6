"""`kvcapsule models`: the model families that work and those that are refused, and how visual spans are found.

It prints the table in `kvcapsule.vlm.families`; the tests build a model for every row of it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from ..errors import KVCapsuleError
from ..vlm.families import FAMILIES, TRANSFORMERS, Family
from .errors import Parser, complain
from .results import STDOUT, add_json_option, add_wide_option, require_writable, write_json

PROG = "kvcapsule models"
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
    wide: bool


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the JSON, and return the exit code."""
    options = _parser().read(argv, Options())
    try:
        require_writable([options.json])
        if options.json != STDOUT:
            _print_table(FAMILIES, options.wide)
        write_json(options.json, [{**asdict(family), "transformers": TRANSFORMERS} for family in FAMILIES])
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def _print_table(families: Sequence[Family], wide: bool) -> None:
    from .tables import NAME, TEXT, Column, ReportTable, print_report

    table = ReportTable(
        [
            Column("family", NAME),
            Column("status", NAME),
            Column("trained", NAME),
            Column("model type", NAME),
            Column("positions", NAME, wide=True),
            Column("a span is", NAME, wide=True),
            Column("span boundary", NAME, wide=True),
            Column("tested with", NAME, wide=True),
            Column("note", TEXT),
        ],
        note=f"tested with transformers {TRANSFORMERS}",
    )
    for family in families:
        types, classes = ("\n".join(dict.fromkeys(names)) for names in (family.model_types, family.classes))
        table.add(
            family.name,
            family.status,
            "yes" if family.trained else "",
            types,
            _POSITIONS[family.positions],
            ", ".join(kind for kind in (family.span, family.video) if kind),
            family.span_boundary,
            classes,
            family.note,
        )
    print_report(table, wide=wide)


def _parser() -> Parser:
    parser = Parser(
        prog=PROG, description="List the model families, whether they work, and how their visual spans are found."
    )
    add_json_option(parser)
    add_wide_option(parser)
    return parser
