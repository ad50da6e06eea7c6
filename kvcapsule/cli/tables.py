"""Printing tables: as wide as the terminal, or, into a file or a pipe, as wide as they were made for."""

import sys
from typing import NoReturn

from rich.console import Console
from rich.table import Table

REPORT_WIDTH = 160
"""Columns of the tables of a report where stdout is no terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would end the process by itself; `kvcapsule.cli.main` says how every command ends.
        raise BrokenPipeError


def report_console() -> Console:
    """Stdout, for the tables of a report."""
    # A file has no edge to wrap at.
    return _Console(width=None if sys.stdout.isatty() else REPORT_WIDTH, highlight=False)


def print_table(table: Table, width: int, below: str = "") -> None:
    """Print the table to stdout, and a line below it.

    Args:
        width: columns where stdout is no terminal: a file has no edge to wrap at.
    """
    console = _Console(width=None if sys.stdout.isatty() else width, highlight=False, markup=False)
    console.print(table)
    if below:
        console.print(below)
