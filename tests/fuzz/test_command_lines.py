"""Some hundred of the command lines that tests/fuzz/command_lines.py draws, with a seed of its own; and what the fuzzer
would see."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import LONGEST, at_the_start_of_work, fuzz, outcome
from command_words import VALID, write_files

from kvcapsule.checkpoints import HERE
from kvcapsule.cli import models


def test_every_mutated_command_line_is_refused_in_one_line_or_works() -> None:
    report = fuzz(150, seed=19)
    assert report.failures == []
    assert report.slowest < LONGEST and report.peak < 2**30
    assert sum(counts["refused"] for counts in report.outcomes.values()) > 50


def test_the_lines_that_are_mutated_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, HERE / "pages-vlm-cross-layer")
    monkeypatch.chdir(tmp_path)
    with at_the_start_of_work():
        for command, lines in VALID.items():
            for line in lines:
                result, said = outcome([command, *line.split()])
                assert result != "refused", (command, line, said)


def raise_a_defect(argv: list[str]) -> int:
    raise KeyError("x")


def say_two_lines(argv: list[str]) -> int:
    print("first", file=sys.stderr)
    return models.complain(models.PROG, "second")


def exit_otherwise(argv: list[str]) -> int:
    return 3


def write_elsewhere(argv: list[str]) -> int:
    Path("../elsewhere").write_text("x")
    return 0


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        (raise_a_defect, "KeyError"),
        (say_two_lines, "not one line"),
        (exit_otherwise, "exit code 3"),
        (write_elsewhere, "elsewhere"),
    ],
)
def test_a_defect_is_seen(
    defect: Callable[[list[str]], int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "main", defect)
    monkeypatch.setattr("command_lines.command_line", lambda draw, known: ["models"])
    (failure,) = fuzz(1, seed=0).failures
    assert said in failure and "line 0 of seed 0" in failure
