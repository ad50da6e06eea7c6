"""Rewrite the generated tables of the documents from the committed results: `python -m kvcapsule.eval.pages`, or
`make pages`.

Nothing is measured. A run of `kvcapsule eval --report` or `kvcapsule bench --report` writes its own table; this command
is for a change of the tables' form, and its test holds that the documents show the numbers of the JSON files.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcapsule.cli.results import write_whole

from .bench import bench_page
from .bench.bench_config import LEVELS
from .bench.engine import page as engine_page
from .report import by_dataset, lmms, markdown
from .report.file_command import FileCommand, read_result
from .studies import long_answer

PROG = "python -m kvcapsule.eval.pages"
RESULTS = "eval/results"


@dataclass(frozen=True)
class PagesConfig:
    """Which documents are rewritten."""

    root: str = "."
    """Root folder of the repository."""


def _short(name: str) -> Callable[[Path, Mapping[str, Any], str], None]:
    """The short table of a run."""
    return lambda page, result, file: _put_short(name, page, result, file)


def _put_short(name: str, page: Path, result: Mapping[str, Any], file: str) -> None:
    note = markdown.paragraph(
        markdown.facts(result),
        *markdown.protocol_notes(result["rows"]),
        *markdown.short_note(result["rows"]),
    )
    command = markdown.command_block(page, result["command"], file)
    markdown.write_between_markers(page, name, "\n\n".join([markdown.short_table(result["rows"]), note, command]))


def _suite(name: str, picture: bool = True) -> Callable[[Path, Mapping[str, Any], str], None]:
    """The full table of a suite, with its picture if it has one."""
    return lambda page, result, file: markdown.refresh(
        page, name, result, file, str(Path(file).with_suffix(".png")) if picture else None
    )


def _data_sets(page: Path, result: Mapping[str, Any], file: str) -> None:
    """Accuracy by data set."""
    by_dataset.refresh(page, "smol-transfer-sets", result, file)


def _bench(page: Path, result: Mapping[str, Any], file: str) -> None:
    """The tables of all levels of the bench."""
    bench_page.refresh(page, result, LEVELS, file, f"{RESULTS}/bench-cpu-serving.png")


def _long_answer(page: Path, result: Mapping[str, Any], file: str) -> None:
    write_whole(page, long_answer.page(result).encode())


def _lmms(name: str) -> Callable[[Path, Mapping[str, Any], str], None]:
    """What lmms-eval and `kvcapsule eval` say of the same questions."""
    return lambda page, result, file: lmms.refresh(page, name, result, file)


PAGES: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], str], None]]] = {
    "pages.json": ("README.md", _short("pages")),
    "smol-vlm-later-560.json": ("README.md", _short("smol-vlm-560")),
    "pages-later.json": ("docs/results.md", _short("pages-later")),
    "rate-distortion.json": ("docs/results-tables.md", _suite("rate-distortion")),
    "aligned.json": ("docs/results-tables.md", _suite("aligned", picture=False)),
    "smol-vlm.json": ("docs/results-tables.md", _suite("smol-vlm")),
    "smol-vlm-later.json": ("docs/results-tables.md", _suite("smol-vlm-later", picture=False)),
    "smol-transfer.json": ("docs/results-tables.md", _data_sets),
    "policies.json": ("docs/policies-tables.md", _suite("policies")),
    "policies-2026.json": ("docs/policies-tables.md", _suite("policies-2026", picture=False)),
    "policies-later.json": ("docs/policies-tables.md", _suite("policies-later", picture=False)),
    "bench-cpu.json": ("docs/bench-tables.md", _bench),
    "serving-cpu.json": ("docs/serving.md", engine_page.refresh),
    "long-answer.json": ("docs/long-answer.md", _long_answer),
    "lmms-pages.json": ("docs/benchmarks.md", _lmms("lmms-pages")),
    "lmms-smol-vlm.json": ("docs/benchmarks.md", _lmms("lmms-smol-vlm")),
}
"""By file of a result: the page that shows it, and the function that writes its table."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return FileCommand(
        PROG,
        PagesConfig,
        usage="[--root DIR]",
        description="Rewrite the generated tables of the documents from the committed results.",
        run=rewrite,
    ).main(argv)


def rewrite(config: PagesConfig) -> None:
    """Rewrite the tables of all pages.

    Raises:
        InputError: if a result cannot be read, or a page has no place for its table.
    """
    root = Path(config.root)
    for name, (page, write) in PAGES.items():
        file = root / RESULTS / name
        write(root / page, read_result(file), str(file))


if __name__ == "__main__":
    sys.exit(main())
