"""`kvcapsule report`: one HTML page about a capsule."""

import shlex
import sys
from pathlib import Path

from jsonargparse import ArgumentError

from kvcapsule.cli.errors import complain
from kvcapsule.cli.options import OptionParser, instance, option_parser
from kvcapsule.cli.results import require_writable, shown_path, write_whole
from kvcapsule.errors import InputError, KVCapsuleError

from .page_config import PageConfig

PROG = "kvcapsule report"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        name, config = _parse(words)
        # --help and a mistyped option do not wait for torch.
        from rich.console import Console

        from .content import gather
        from .page import html

        file = config.output or _default_file(name)
        require_writable([file])
        page = html(gather(name, config, Console(stderr=True))).encode()
        write_whole(Path(file), page)
        print(f"page saved to {shown_path(file)} ({len(page) / 1e6:.1f} MB): open it in a browser.")
        if Path(file).name == "report.html":
            print(f"next: kvcapsule push {shlex.quote(name)} organisation/name uploads it with the capsule.")
    except (ArgumentError, KVCapsuleError) as error:
        return complain(PROG, error)
    return 0


def build_parser() -> OptionParser:
    """Every field of PageConfig as an option, explained by its docstring."""
    return option_parser(
        PageConfig,
        PROG,
        usage=f"{PROG} CAPSULE [--output FILE] [--evaluation JSON] [--examples N] [options]",
        description=(
            "Write one HTML page about CAPSULE (a folder, a shipped name or an id on the Hub): what it is, bytes and"
            " quality beside other methods, examples answered side by side, and what is lost of each token."
        ),
    )


def _parse(words: list[str]) -> tuple[str, PageConfig]:
    """The capsule, and the options: those of the command line, then what the capsule was trained with, then defaults.

    Raises:
        ConfigError, InputError, ArgumentError: for unknown options, or values that they cannot have.
    """
    parser = build_parser()
    if not words or words[0] in ("-h", "--help"):
        parser.read(words)
    if not words or words[0].startswith("-"):
        raise InputError("name the capsule first: kvcapsule report CAPSULE [options].")
    name, *options = words
    instance(PageConfig, parser, parser.read(options))
    from ..capsule_defaults import set_defaults

    # What is wrong with the options themselves was said before a capsule is looked for.
    set_defaults(parser, options, name)
    return name, instance(PageConfig, parser, parser.read(options))


def _default_file(name: str) -> str:
    from kvcapsule.capsule.hub import local_folder
    from kvcapsule.capsule.read import REPORT_FILE
    from kvcapsule.checkpoints import shipped

    folder = local_folder(name, None)
    if folder is not None and shipped(name) is None:
        return str(folder / REPORT_FILE)
    return f"{name.rpartition('/')[2]}-{REPORT_FILE}"
