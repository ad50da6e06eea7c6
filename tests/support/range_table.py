"""The table in docs/models.md of the range tests on each version of transformers; `make test-range` runs this.

Reads pytest's JUnit files, one a version; each names its transformers in a property (tests/conftest.py).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple
from xml.etree import ElementTree

from kvcapsule.eval.report.markdown import write_between_markers

NAME = "transformers-range"


class Outcome(NamedTuple):
    """One version's run."""

    transformers: str
    passed: int
    failed: int
    skipped: Counter[str]
    """Reason to count."""


def read(path: Path) -> Outcome:
    """The outcome that a JUnit file holds."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    version = next(p.attrib["value"] for p in suite.iter("property") if p.attrib["name"] == "transformers")
    skipped = Counter(s.attrib["message"] for s in suite.iter("skipped"))
    total, failed = int(suite.attrib["tests"]), int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return Outcome(version, total - failed - skipped.total(), failed, skipped)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each version, and under it why tests were skipped."""
    rows = ["| transformers | passed | failed | skipped |", "|---|---|---|---|"]
    rows += [f"| {o.transformers} | {o.passed} | {o.failed} | {o.skipped.total()} |" for o in outcomes]
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        for reason, count in sorted(outcome.skipped.items()):
            reasons.setdefault(reason, []).append(f"{outcome.transformers} ({count})")
    notes = [
        fill(f"- {reason}. Skipped on {', '.join(versions)}.", 120, subsequent_indent="  ", break_on_hyphens=False)
        for reason, versions in reasons.items()
    ]
    return "\n".join([*rows, *([""] if notes else []), *notes])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table; 1 if a version failed a test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, required=True, help="the Markdown file with the table's markers")
    parser.add_argument("files", type=Path, nargs="+", help="JUnit files of pytest, one a version")
    arguments = parser.parse_args(argv)
    outcomes = [read(path) for path in arguments.files]
    write_between_markers(arguments.page, NAME, table(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
