"""Tables at 80 and 120 columns and in a pipe: nothing is cut, no number is broken, what matters is there."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.terminal import lines_on_terminal

from kvcapsule.cli.tables import NAME, TEXT, Column, ReportTable, print_report
from kvcapsule.eval.bench import level_tables
from kvcapsule.eval.report import rows
from kvcapsule.training.analysis import report
from kvcapsule.training.summary import errors_table
from kvcapsule.vlm.families import FAMILIES

RESULTS = Path(__file__).resolve().parents[2] / "eval" / "results"
WIDTHS = (80, 120)
GAP = "  "


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def printed(*parts: ReportTable | str, width: int | None, wide: bool = False) -> list[str]:
    """Lines on a terminal of so many columns; None: in a pipe."""
    console = Console(width=width or 80, force_terminal=width is not None, color_system=None)
    with console.capture() as captured:
        print_report(*parts, wide=wide, console=console)
    return captured.get().splitlines()


def fields(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield from filter(None, re.split(r" {2,}", line.strip()))


def assert_whole(table: ReportTable, lines: Sequence[str], wide: bool) -> None:
    """No number and no name of the shown columns is cut or broken, and all text is there."""
    written, text = set(fields(lines)), "".join("".join(lines).split())
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if not column.wide or wide:
                if column.kind == TEXT:
                    assert all(word in text for word in cell.split())
                else:
                    assert written.issuperset(filter(None, cell.split("\n"))), (column.title, cell)
    assert not any("…" in line for line in lines)


def of_commands() -> dict[str, list[ReportTable]]:
    """The tables of committed results, long names and great numbers among them."""
    bench, suite = read("bench-cpu.json"), read("policies.json")
    failed = {**bench["rows"][0], "ratio": None, "failed": "relative error 0.0312"}
    trained = {f"layer{i}/{name}": 0.1234 for i in range(64) for name in ("keys_unexplained", "output_error")}
    return {
        "bench": [
            part
            for part in level_tables.tables({**bench, "rows": [*bench["rows"], failed]})
            if isinstance(part, ReportTable)
        ],
        "eval": rows.tables(read("pages.json")["rows"], "pages-vlm on pages"),
        "eval of a suite": [
            *rows.tables([{**row, "kv_bytes": 10**12} for row in suite["rows"]], "great"),
            *rows.tables(read("smol-vlm-full.json")["rows"], "many tasks"),
        ],
        "analyze": [
            table
            for name in ("analyze-pages.json", "analyze-smol-vlm.json")
            for table in report.tables({"stacks": []} | read(name))
        ],
        "train": [errors_table({**trained, "questions": 64})],
    }


TABLES = of_commands()


@pytest.mark.parametrize("command", TABLES)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("width", [*WIDTHS, 60])
def test_nothing_is_cut_on_a_terminal(command: str, wide: bool, width: int) -> None:
    for table in TABLES[command]:
        lines = printed(table, width=width, wide=wide)
        assert max(map(len, lines)) <= width
        assert_whole(table, lines, wide)


@pytest.mark.parametrize("command", ["bench", "eval", "analyze", "train"])
def test_by_default_the_columns_stand_beside_each_other(command: str) -> None:
    for table in TABLES[command]:
        lines = printed(table, width=80)
        assert sum(set(line.strip()) == {"─"} for line in lines) == 1, "\n".join(lines)


@pytest.mark.parametrize("command", TABLES)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_in_a_pipe_a_row_is_a_line(command: str, wide: bool) -> None:
    for table in TABLES[command]:
        lines = printed(table, width=None, wide=wide)
        assert len(lines) == bool(table.title) + 2 + len(table.rows) + bool(table.note)
        shown = [i for i, column in enumerate(table.columns) if wide or not column.wide]
        first = bool(table.title) + 2
        for row, line in zip(table.rows, lines[first:], strict=False):
            assert line.split() == " ".join(row.cells[i].replace("\n", ", ") for i in shown).split()


def test_wide_shows_what_is_left_out() -> None:
    """Of every table that leaves columns out."""
    left_out = [table for tables in TABLES.values() for table in tables if any(c.wide for c in table.columns)]
    assert left_out
    for table in left_out:
        hidden = {column.title.replace("\n", " ") for column in table.columns if column.wide}
        narrow, wide = (set(fields(printed(table, width=None, wide=wide))) for wide in (False, True))
        assert not hidden & narrow and hidden <= wide


def test_text_is_folded_and_markup_is_text() -> None:
    table = ReportTable([Column("name", NAME), Column("bytes"), Column("what", TEXT)], "[a] title", "[b] note")
    table.add("[red]", "1,234,567,890", "x" * 90 + " " + "words " * 30, is_strong=True)
    lines = printed(table, "[c] line", width=80)
    assert "[a] title" in lines and "[b] note" in lines and "[c] line" in lines
    assert_whole(table, lines[:1] + [line.replace("bytes", "") for line in lines], wide=False)
    assert "".join(lines).count("x") == 90


def test_a_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="1 cells in a table of 2 columns"):
        ReportTable([Column("a"), Column("b")]).add("1")


@pytest.mark.parametrize("columns", WIDTHS)
def test_models_on_a_real_terminal(columns: int) -> None:
    lines = lines_on_terminal(columns, "models")
    assert max(map(len, lines)) <= columns
    for family in FAMILIES:
        assert any(re.match(rf"{re.escape(family.name)} +{family.status}\b", line) for line in lines), family.name
    wide = lines_on_terminal(columns, "models", "--wide")
    assert max(map(len, wide)) <= columns
    assert {"span boundary", "tested with"} <= set(fields(wide))
    assert {name for family in FAMILIES for name in family.classes} <= set(fields(wide))


def test_methods_on_a_real_terminal() -> None:
    lines = lines_on_terminal(80, "methods")
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"snapkv +policy +2404\.14469 +SnapKV", line) for line in lines)


def test_estimate_on_a_real_terminal() -> None:
    words = "estimate --model pages-vlm --visual-tokens 196000 --images 64 --batch 256".split()
    lines = lines_on_terminal(80, *words)
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"full +12,845,056,000 +131,072 +12,845,187,072$", line.strip()) for line in lines)


def test_models_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-m", "kvcapsule", "models"], capture_output=True, text=True, check=True)
    _, _, *families, _ = done.stdout.splitlines()
    assert [line.split(GAP)[0] for line in families] == [family.name for family in FAMILIES]
    assert any("qwen3_vl, qwen3_vl_moe" in line for line in families)
