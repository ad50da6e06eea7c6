"""Draw the picture of a result again, without measuring: `python -m kvcapsule.eval.report.redraw --json
RESULT.json --plot PICTURE.png`."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvcapsule.cli.results import require_writable
from kvcapsule.errors import InputError

from . import rate_curves, scatter
from .file_command import FileCommand
from .picture import save_picture
from .picture_name import require_picture_name
from .title import title_of

PROG = "python -m kvcapsule.eval.report.redraw"


@dataclass(frozen=True)
class RedrawConfig:
    """Which result is drawn, and where."""

    json: str
    """File of `kvcapsule eval --json FILE`."""
    plot: str
    """File for the picture: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        require_picture_name(self.plot)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return FileCommand(
        PROG,
        RedrawConfig,
        usage="--json RESULT.json --plot PICTURE.png",
        description="Draw the picture of a result of kvcapsule eval again; nothing is measured.",
        run=redraw,
    ).main(argv)


def redraw(config: RedrawConfig) -> None:
    """Read the result and write its picture.

    Raises:
        InputError: for a file that cannot be read or is no such result, or a picture that cannot be written.
    """
    require_writable([config.plot])
    try:
        figure = picture_of(json.loads(Path(config.json).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(
            f"{config.json} cannot be drawn ({type(error).__name__}: {error}): give a file of `kvcapsule eval --json`."
        ) from error
    save_picture(figure, Path(config.plot))


def picture_of(result: Mapping[str, Any]) -> Figure:
    """The picture of a result: lines for that of a suite, which its command names, else a marker for each row."""
    suite = any(word.partition("=")[0] == "--suite" for word in shlex.split(result["command"]))
    drawn: Figure = (rate_curves if suite else scatter).picture(result["rows"], title_of(result))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
