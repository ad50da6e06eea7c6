"""Tables of results: at any width of a terminal no number is cut, and in a pipe or a file every row is one line.

On a terminal, text is folded, and columns that do not fit beside each other stand in a further block below, with the
first column again. A table has the columns that most readers want; `--wide` shows all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

NUMBER, NAME, TEXT = "number", "name", "text"
"""Kinds of columns: numbers stand at the right, names and text at the left; text alone may be folded."""
_LEAST_TEXT = 20
"""Characters that a column of text has at least, where it has as many."""
_ANY_WIDTH = 10**6


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would end the process by itself; `kvcapsule.cli.main` says how every command ends.
        raise BrokenPipeError


class Column(NamedTuple):
    """A column of a table."""

    title: str
    """Its head; in a pipe its lines are joined."""
    kind: str = NUMBER
    wide: bool = False
    """Shown with --wide alone."""


class Row(NamedTuple):
    """A row of a table."""

    cells: tuple[str, ...]
    """Of all columns; in a pipe the lines of a cell are joined."""
    is_strong: bool = False
    """In bold, on a terminal."""
    ends_section: bool = False
    """A line is drawn below it, on a terminal."""


@dataclass
class ReportTable:
    """Columns and rows, and the lines above and below them. The first column names the row."""

    columns: Sequence[Column]
    title: str = ""
    note: str = ""
    """What the columns mean."""
    rows: list[Row] = field(default_factory=list)

    def add(self, *cells: str, is_strong: bool = False) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells in a table of {len(self.columns)} columns.")
        self.rows.append(Row(cells, is_strong))

    def end_section(self) -> None:
        """Put a line below the rows so far."""
        self.rows[-1] = self.rows[-1]._replace(ends_section=True)


def print_report(*parts: ReportTable | str, wide: bool = False, console: Console | None = None) -> None:
    """Print tables and lines.

    Args:
        parts: in this order; a blank line stands in front of all but the first.
        wide: with all columns.
        console: where to; None: stdout.
    """
    console = console or _Console(highlight=False, markup=False)
    for number, part in enumerate(parts):
        if number:
            console.print()
        if isinstance(part, str):
            _print_line(console, part)
            continue
        if part.title:
            _print_line(console, part.title)
        for position, block in enumerate(_blocks(part, wide, console)):
            if position:
                console.print()
            console.print(block, crop=False)
        if part.note:
            _print_line(console, part.note)


def _print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _blocks(table: ReportTable, wide: bool, console: Console) -> Iterator[Table]:
    """The table's columns, as many beside each other as fit."""
    shown = [i for i, column in enumerate(table.columns) if wide or not column.wide]
    if not shown:
        return
    if not console.is_terminal:
        block = _block(table, shown, on_one_line=True)
        block.width = _widths(block, console)[1]
        yield block
        return
    first, *rest = shown
    while True:
        chosen = [first]
        while rest and (len(chosen) == 1 or _fits(table, [*chosen, rest[0]], console)):
            chosen.append(rest.pop(0))
        yield _block(table, chosen)
        if not rest:
            return


def _fits(table: ReportTable, chosen: Sequence[int], console: Console) -> bool:
    return _widths(_block(table, chosen), console)[0] <= console.width


def _widths(block: Table, console: Console) -> tuple[int, int]:
    """The least and the greatest width that a block needs."""
    measured = block.__rich_measure__(console, console.options.update(width=_ANY_WIDTH))
    return measured.minimum, measured.maximum


def _block(table: ReportTable, chosen: Sequence[int], on_one_line: bool = False) -> Table:
    """Some columns as rich prints them; on_one_line: every row on one line."""
    block = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i in chosen:
        column = table.columns[i]
        lines = [line for text in (column.title, *(row.cells[i] for row in table.rows)) for line in text.split("\n")]
        longest = max(map(cell_len, lines))
        block.add_column(
            Text(column.title.replace("\n", " ") if on_one_line else column.title),
            justify="right" if column.kind == NUMBER else "left",
            no_wrap=on_one_line or column.kind != TEXT,
            overflow="fold",
            min_width=min(_LEAST_TEXT, longest) if column.kind == TEXT else longest,
        )
    for row in table.rows:
        block.add_row(
            *(Text(row.cells[i].replace("\n", ", ") if on_one_line else row.cells[i]) for i in chosen),
            style="bold" if row.is_strong else None,
            end_section=row.ends_section and not on_one_line,
        )
    return block
