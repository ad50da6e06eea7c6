"""Commands that read files of results and rewrite what shows them; nothing is measured."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from jsonargparse import ArgumentError

from kvcapsule.cli.errors import complain
from kvcapsule.cli.options import instance, option_parser
from kvcapsule.errors import InputError, KVCapsuleError

Config = TypeVar("Config")


@dataclass(frozen=True)
class FileCommand(Generic[Config]):
    """A command whose options name files."""

    prog: str
    config: type[Config]
    """The dataclass of its options."""
    usage: str
    """The options that its usage shows."""
    description: str
    run: Callable[[Config], None]
    """Does it; what it raises as KVCapsuleError becomes one line on stderr."""
    lists: Mapping[str, bool] = field(default_factory=dict)
    """See OptionParser."""

    def main(self, argv: list[str] | None) -> int:
        """Run it and return the exit code: 2, and one line on stderr, for input that cannot be used.

        Args:
            argv: its words; None: those of this process.
        """
        try:
            parser = option_parser(
                self.config,
                self.prog,
                usage=f"{self.prog} {self.usage}",
                description=self.description,
                lists=self.lists,
            )
            self.run(instance(self.config, parser, parser.read(sys.argv[1:] if argv is None else argv)))
        except (ArgumentError, KVCapsuleError) as error:
            return complain(self.prog, error)
        return 0


def read_result(path: Path) -> dict[str, Any]:
    """The JSON object of a file of results.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    return result
