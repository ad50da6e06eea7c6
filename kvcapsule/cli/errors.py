"""Printing a KVCapsuleError: one line on stderr and an exit code, no traceback."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from .parse_errors import plain_line, with_near_option
from .streams import discard

WRONG_INPUT = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells count."""
CLOSED_PIPE = 141
"""128 + SIGPIPE: the reader of the output went away, as `head` does once it has its lines."""
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
_NO_JSON_FILE = re.compile(r"argument --json: expected one argument", re.IGNORECASE)
_JSON_ADVICE = "--json needs a FILE, or - to print the JSON to standard output"

_LONGEST = 2000
"""Characters of a line."""
_LONG_WORD = re.compile(r"(\S{160})\S{120,}(\S{20})")

Options = TypeVar("Options", bound=argparse.Namespace)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage in front.

    Options cannot be abbreviated: what is unambiguous today would not be after the next option. Underscores in their
    names are accepted in place of dashes.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def print_help(self, file: Any = None) -> None:
        """As argparse's, but help that cannot be written is an error."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        message = with_near_option(message, self._option_string_actions)
        self.exit(complain(self.prog, f"{message} (`{self.prog} --help` shows the options)"))

    def read(self, argv: Sequence[str] | None, options: Options, renamed: Mapping[str, str] | None = None) -> Options:
        """Parse a command line (None: that of the process) into `options`.

        Args:
            argv: its words.
            options: an empty namespace of the command's own class.
            renamed: options that no longer exist, such as "--ratio", and the sentence that names the new one.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        parts = (word.partition("=") for word in words)
        spelled = [(dashed(name) if name.startswith("--") else name) + equals + value for name, equals, value in parts]
        for word in spelled:
            if (sentence := (renamed or {}).get(word.partition("=")[0])) is not None:
                self.exit(complain(self.prog, sentence))
        return self.parse_args(spelled, namespace=options)


def complain(prog: str, error: object) -> int:
    """Print an error of several lines as one, and return the exit code.

    Options are spelled with dashes, the middle of long names and lines is left out, and characters that would steer a
    terminal are escaped.
    """
    message = plain_line(_NO_JSON_FILE.sub(_JSON_ADVICE, " ".join(str(error).split())))
    message = _LONG_WORD.sub(r"\1...\2", "".join(map(_printable, message)))
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]}...{message[-_LONGEST // 2 :]}"
    try:
        print(f"{prog}: {dashed(message)}", file=sys.stderr)
    except OSError:
        # Nobody can be told; the exit code is left.
        discard(sys.stderr)
    return WRONG_INPUT


def dashed(text: str) -> str:
    """A text whose options (`--max_new_tokens`) are spelled with dashes (`--max-new-tokens`)."""
    return _OPTION.sub(lambda match: match.group().replace("_", "-"), text)


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
