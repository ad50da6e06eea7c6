"""What the commands of the studies have in common: options, checks before anything is measured, output, errors."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from jsonargparse import ArgumentError

from kvcapsule.cli.errors import complain
from kvcapsule.cli.options import instance, option_parser
from kvcapsule.cli.results import STDOUT, command_line, require_writable, write_json
from kvcapsule.errors import KVCapsuleError


class Options(Protocol):
    """The options of a study."""

    @property
    def json(self) -> str | None:
        """File for the result as JSON; - prints it in place of the table."""


Config = TypeVar("Config", bound=Options)


@dataclass(frozen=True)
class Study(Generic[Config]):
    """The command of a study: its options, what it measures, and how it shows the result."""

    prog: str
    config: type[Config]
    """The dataclass of its options."""
    usage: str
    """The options that its usage shows."""
    description: str
    measure: Callable[[Config, str], dict[str, Any]]
    """From options and the command as it was given to the result."""
    show: Callable[[dict[str, Any]], None]
    """Prints the result, where it does not go to stdout as JSON."""
    files: Sequence[str] = ("json",)
    """Options that name files it writes; they are checked before anything is measured."""
    write: Callable[[Config, dict[str, Any]], None] = lambda *_: None
    """Writes what is to be written beside the JSON."""

    def main(self, argv: list[str] | None) -> int:
        """Run it and return the exit code: 2, and one line on stderr, for input that cannot be used.

        Args:
            argv: its words; None: those of this process.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            usage = f"{self.prog} {self.usage} [options]"
            parser = option_parser(self.config, self.prog, usage=usage, description=self.description)
            config = instance(self.config, parser, parser.read(words))
            require_writable([getattr(config, name) for name in self.files])
            result = self.measure(config, command_line(self.prog, words))
            if config.json != STDOUT:
                self.show(result)
            write_json(config.json, result)
            self.write(config, result)
        except (ArgumentError, KVCapsuleError) as error:
            return complain(self.prog, error)
        return 0
