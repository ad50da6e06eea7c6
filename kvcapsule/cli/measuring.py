"""Commands that measure: options, the measurement, then its tables or its JSON, and what else is to be written."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from jsonargparse import ArgumentError

from ..errors import KVCapsuleError
from .errors import complain
from .results import STDOUT, command_line, write_json


class Measured(Protocol):
    """The options of a command that measures."""

    @property
    def json(self) -> str | None:
        """File for the result as JSON; - prints it in place of the tables."""


Config = TypeVar("Config", bound=Measured)


@dataclass(frozen=True)
class MeasuringCommand(Generic[Config]):
    """A command whose result is one JSON object.

    Its functions import what is slow to import: --help and a mistyped option do not wait for torch.
    """

    prog: str
    parse: Callable[[list[str]], Config]
    """From the words of the command line to the options; it raises KVCapsuleError or ArgumentError."""
    measure: Callable[[Config, str], dict[str, Any]]
    """From the options, and the command as it was given, to the result."""
    show: Callable[[dict[str, Any], Config], None]
    """Prints the result, where it does not go to stdout as JSON."""
    write: Callable[[dict[str, Any], Config], None]
    """Writes what is to be written beside the JSON."""

    def main(self, argv: list[str] | None) -> int:
        """Run it and return the exit code: 2, and one line on stderr, for input that cannot be used.

        Args:
            argv: its words; None: those of this process.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            config = self.parse(words)
            result = self.measure(config, command_line(self.prog, words))
            if config.json != STDOUT:
                self.show(result, config)
            write_json(config.json, result)
            self.write(result, config)
        except (ArgumentError, KVCapsuleError) as error:
            return complain(self.prog, error)
        return 0
