"""How data are read is said in one line by train, eval and analyze, before anything runs; and one answer of several is
learned."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data_forms import COUNT, beside, write_json

from kvcapsule.eval.main import main as evaluate
from kvcapsule.training.analysis.main import main as analyze
from kvcapsule.training.main import main as train

SAID = "read as: question-answers (question, answers, image), images beside the file, {} of 10 rows"
LEARNED = "first answer of up to 2 learned, all accepted"


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [{"image": beside(tmp_path, i), "question": f"What {i}?", "answers": ["4", "four"]} for i in range(COUNT)]
    return write_json(tmp_path / "own.jsonl", rows)


def _train(source: str, vlm: str, folder: Path) -> int:
    """Refused after the line: nothing is trained."""
    return train(["--model", vlm, "--output", str(folder / "c"), "--data.source", source, "--held_out", "40"])


def _eval(source: str, vlm: str, folder: Path) -> int:
    words = ["--budget", "0.5", "--methods", "int4", "--timing", "true", "--max-new-tokens", "4"]
    return evaluate(["--model", vlm, "--data.source", source, *words, "--json", str(folder / "eval.json")])


def _analyze(source: str, vlm: str, folder: Path) -> int:
    """Refused after the line: no image has so many tokens."""
    return analyze(["--model", vlm, "--data.source", source, "--data.size", "8", "--tile", "4096"])


@pytest.mark.parametrize(("command", "rows", "code"), [(_train, 9, 2), (_eval, 1, 0), (_analyze, 8, 2)])
def test_a_line_says_how_data_are_read(
    source: str,
    vlm: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[str, str, Path], int],
    rows: int,
    code: int,
) -> None:
    assert command(source, vlm, tmp_path) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("read as: ")]
    (line,) = lines
    assert line.startswith(SAID.format(rows)) and line.endswith(LEARNED)


@pytest.mark.parametrize("command", [_train, _eval, _analyze])
def test_a_broken_row_is_one_line(
    source: str, vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[[str, str, Path], int]
) -> None:
    """The same of each command, which never gets to run."""
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    write_json(Path(source), [{**row, "answers": None} for row in rows])
    assert command(source, vlm, tmp_path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert " of own.jsonl: the answer is missing, expected text." in last
