"""What the commands of the studies have in common: options, checks before anything is measured, output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from kvcapsule.cli.measuring import Config, MeasuringCommand
from kvcapsule.cli.options import instance, option_parser
from kvcapsule.cli.results import require_writable


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
    write: Callable[[dict[str, Any], Config], None] = lambda *_: None
    """Writes what is to be written beside the JSON."""

    def main(self, argv: list[str] | None) -> int:
        """Run it and return the exit code: 2, and one line on stderr, for input that cannot be used.

        Args:
            argv: its words; None: those of this process.
        """
        return MeasuringCommand(
            self.prog,
            self._parse,
            self.measure,
            lambda result, _: self.show(result),
            self.write,
        ).main(argv)

    def _parse(self, words: list[str]) -> Config:
        usage = f"{self.prog} {self.usage} [options]"
        parser = option_parser(self.config, self.prog, usage=usage, description=self.description)
        config = instance(self.config, parser, parser.read(words))
        require_writable([getattr(config, name) for name in self.files])
        return config
