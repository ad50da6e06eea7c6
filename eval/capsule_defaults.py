"""The model and the data of a run's first capsule, for the options that neither the command line nor a file gives."""

from typing import Any

from kvcapsule.capsule.trained_with import trained_with
from kvcapsule.cli.options import OptionParser

_UNTOLD = "\0"
"""Stands for an option that nobody gave."""


def set_defaults(parser: OptionParser, words: list[str], capsule: str) -> None:
    """Let the parser's defaults be what a capsule was trained with.

    Raises:
        CapsuleError, InputError: if there is no such capsule, or what it was trained with is not on this machine and
            was not named.
    """
    before = {name: parser.get_default(name) for name in ("model", "data.source")}
    parser.set_defaults(dict.fromkeys(before, _UNTOLD))
    values = parser.read(words)
    known, defaults = trained_with(capsule), dict[str, Any](before)
    if values.model == _UNTOLD:
        defaults |= {"model": known.model(), "revision": known.revision}
    if values.data.source == _UNTOLD:
        defaults |= {f"data.{name}": value for name, value in known.data().items()}
    parser.set_defaults(defaults)
