"""What a command does with input that it cannot use: one line on stderr and an exit code, never a traceback."""

import argparse
import sys
from typing import NoReturn

WRONG_INPUT = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells count."""
CLOSED_PIPE = 141
"""128 + SIGPIPE: the reader of the output went away, as `head` does once it has its lines."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage in front.

    Options cannot be abbreviated: what is unambiguous today would not be after the next option.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(complain(self.prog, f"{message} (`{self.prog} --help` shows the options)"))


def complain(prog: str, error: object) -> int:
    """Print an error of several lines as one, and return the exit code."""
    print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
    return WRONG_INPUT
