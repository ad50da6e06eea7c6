"""`kvcapsule store`: what an image store's folder holds, whether it is sound, and making it smaller."""

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, KVCapsuleError
from .errors import Parser, complain
from .results import STDOUT, add_json_option, add_wide_option, require_writable, write_json
from .sizes import byte_count, shown_bytes

if TYPE_CHECKING:
    from ..store.image_store import Entry, ImageStore

PROG = "kvcapsule store"
DAMAGED = 1
"""Exit code of a check that found damaged entries."""
_DIGITS = 12
"""Of an entry's name, in tables."""


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    path: str
    action: str
    max_bytes: int | None
    remove: bool
    wide: bool
    json: str | None


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: those of the process).

    Returns:
        0; 1 if a check found damaged entries; 2 for input that cannot be used.
    """
    options = _parser().read(argv, Options())
    try:
        return run(options)
    except KVCapsuleError as error:
        return complain(PROG, error)


def run(options: Options) -> int:
    """Raises InputError for options that do not go together, and for a folder that is none or cannot be used."""
    from ..store.image_store import ImageStore

    if (options.max_bytes is None) is (options.action == "prune"):
        raise InputError("--max-bytes says what prune leaves: give it with prune, and with nothing else.")
    if options.remove and options.action != "check":
        raise InputError("--remove removes what a check finds damaged: give it with check.")
    if not Path(options.path).expanduser().is_dir():
        raise InputError(f"there is no folder {options.path}: name the folder of an image store.")
    require_writable([options.json])
    store = ImageStore(options.path, max_bytes=0)
    try:
        return {"list": _list, "check": _check, "prune": _prune}[options.action](store, options)
    except OSError as error:
        raise InputError(f"{options.path} cannot be used: {error.strerror or error}.") from error


def _list(store: "ImageStore", options: Options) -> int:
    from .tables import NAME, TEXT, Column, ReportTable, print_report

    entries = store.entries()
    if options.json != STDOUT:
        total = sum(entry.bytes for entry in entries)
        table = ReportTable(
            [
                Column("entry", NAME),
                Column("bytes"),
                Column("tokens"),
                Column("grid", NAME, wide=True),
                Column("last use", NAME),
                Column("model", TEXT),
                Column("capsule", TEXT, wide=True),
            ],
            note=f"{_counted(len(entries))}, {shown_bytes(total)}",
        )
        for entry in entries:
            table.add(*_row(entry))
        print_report(table, wide=options.wide)
    write_json(options.json, [_values(entry) for entry in entries])
    return 0


def _check(store: "ImageStore", options: Options) -> int:
    damages = store.check(remove=options.remove)
    if options.json != STDOUT:
        for damage in damages:
            print(f"{damage.digest}: {damage.reason}")
        sound = len(store.entries()) - (0 if options.remove else len(damages))
        removed = ", removed" if options.remove and damages else ""
        print(f"{_counted(sound)} sound, {len(damages)} damaged{removed}")
    write_json(options.json, [damage._asdict() for damage in damages])
    return DAMAGED if damages else 0


def _prune(store: "ImageStore", options: Options) -> int:
    assert options.max_bytes is not None
    evicted = store.prune(options.max_bytes)
    left = store.total_bytes()
    if options.json != STDOUT:
        print(f"{_counted(evicted.entries)} removed, {shown_bytes(evicted.bytes)}; {shown_bytes(left)} left")
    write_json(options.json, {"entries": evicted.entries, "bytes": evicted.bytes, "left": left})
    return 0


def _row(entry: "Entry") -> list[str]:
    used = datetime.fromtimestamp(entry.last_used).isoformat(" ", "seconds")
    if entry.header is None:
        return [entry.digest[:_DIGITS], f"{entry.bytes:,}", "", "", used, "(damaged)", ""]
    about = entry.header.about
    grid = "x".join(str(axis) for axis in about.get("grid") or ())
    tokens, model, capsule = (str(about.get(name, "")) for name in ("tokens", "model", "capsule"))
    return [entry.digest[:_DIGITS], f"{entry.bytes:,}", tokens, grid, used, model, capsule]


def _values(entry: "Entry") -> dict[str, Any]:
    about = None if entry.header is None else entry.header.about
    return {"entry": entry.digest, "bytes": entry.bytes, "last_used": entry.last_used, "about": about}


def _counted(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _parser() -> Parser:
    parser = Parser(PROG, "List, check or prune the folder of an image store, which `attach(..., store=...)` fills.")
    parser.add_argument("path", metavar="PATH", help="the store's folder")
    parser.add_argument(
        "action",
        choices=("list", "check", "prune"),
        help="list: what is stored, the most recently used first; check: read every entry, and exit with 1 if any is"
        " damaged; prune: remove the least recently used",
    )
    parser.add_argument(
        "--max-bytes", metavar="SIZE", type=byte_count, help="of prune: the most to leave, such as 500MB or 10GB"
    )
    parser.add_argument("--remove", action="store_true", help="of check: remove what is damaged")
    add_json_option(parser)
    add_wide_option(parser)
    return parser
