"""Printing tables: as wide as the terminal, or of a fixed width in a file or a pipe."""

import sys
from typing import NoReturn

from rich.console import Console
from rich.table import Table

REPORT_WIDTH = 160
"""Columns of a report's tables where stdout is no terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would end the process by itself; `kvcapsule.cli.main` says how every command ends.
        raise BrokenPipeError


def report_console() -> Console:
    """A console on stdout for the tables of a report."""
    return _Console(width=None if sys.stdout.isatty() else REPORT_WIDTH, highlight=False)


def print_table(table: Table, width: int, below: str = "") -> None:
    """Print the table to stdout, and a line below it.

    Args:
        table: to be printed.
        width: columns where stdout is no terminal.
        below: the line.
    """
    console = _Console(width=None if sys.stdout.isatty() else width, highlight=False, markup=False)
    console.print(table)
    if below:
        console.print(below)
