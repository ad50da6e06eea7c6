"""`kvcapsule list`: the capsules of this machine."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, KVCapsuleError
from ..methods.shown_names import shown_name
from .errors import Parser, complain
from .results import STDOUT, add_json_option, add_wide_option, require_writable, write_json
from .sizes import shown_bytes

if TYPE_CHECKING:
    from ..capsule.overview import Overview

PROG = "kvcapsule list"


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    folders: list[str]
    wide: bool
    json: str | None


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the JSON, and return the exit code; damaged capsules are named below the table."""
    options = _parser().read(argv, Options())
    try:
        _run(options)
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def _run(options: Options) -> None:
    from ..capsule.overview import Overview, capsules_here
    from .tables import NAME, TEXT, Column, ReportTable, print_report

    folders = [Path(folder).expanduser() for folder in options.folders]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise InputError(f"there is no folder {', '.join(missing)}: name folders that hold capsules.")
    require_writable([options.json])
    values, damages = [], []
    table = ReportTable(
        [
            Column("capsule", NAME),
            Column("model", NAME),
            Column("family", NAME),
            Column("compression\nvs 16 bit"),
            Column("weights"),
            Column("place", NAME),
            Column("tile", wide=True),
            Column("output error", wide=True),
            Column("folder", TEXT, wide=True),
        ]
    )
    for place, capsule in capsules_here(folders):
        if isinstance(capsule, Overview):
            values.append(_values(place, capsule))
            table.add(*_row(place, capsule))
        else:
            damages.append(str(capsule))
    if options.json != STDOUT:
        count = len(values)
        table.note = f"{count} capsule{'' if count == 1 else 's'}" + ("" if table.rows else ", none here")
        print_report(table, *damages, wide=options.wide)
    write_json(options.json, [*values, *({"error": damage} for damage in damages)])


def _row(place: str, capsule: "Overview") -> tuple[str, ...]:
    error = capsule.training.get("output_error")
    return (
        capsule.name,
        capsule.config.base_model,
        shown_name(capsule.config.family),
        "–" if capsule.compression is None else f"{capsule.compression:.1f}x",
        shown_bytes(capsule.weight_bytes),
        place,
        str(capsule.config.codec.tile),
        f"{error:.4f}" if isinstance(error, float) else "–",
        str(capsule.folder),
    )


def _values(place: str, capsule: "Overview") -> dict[str, Any]:
    return {
        "name": capsule.name,
        "place": place,
        "family": capsule.config.family,
        "model": capsule.config.base_model,
        "tile": capsule.config.codec.tile,
        "compression": capsule.compression,
        "weight_bytes": capsule.weight_bytes,
        "output_error": capsule.training.get("output_error"),
    }


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description=(
            "List the capsules of this machine: those shipped with kvcapsule, those in folders, and those downloaded"
            " from the Hub."
        ),
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        default=["."],
        help="where to look, up to three folders deep (default: the working directory)",
    )
    add_json_option(parser)
    add_wide_option(parser)
    return parser
