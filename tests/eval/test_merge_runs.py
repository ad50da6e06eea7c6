"""Results of several runs as one, and accuracy by data set."""

import json
from copy import deepcopy
from typing import Any

import pytest
from support.suite_files import QUICK, evaluate, rows_of

from kvcapsule.errors import InputError
from kvcapsule.eval.report import by_dataset
from kvcapsule.eval.report.by_dataset import BySetConfig
from kvcapsule.eval.report.merge_runs import JoinConfig, join, main

ENTRIES = [{"method": "int2"}, {"method": "evenly-spaced", "ratio": 4}, {"method": "int8"}]


@pytest.fixture(scope="module")
def part() -> dict[str, Any]:
    return {
        "model": "m",
        "rows": [{"method": "full", "n": 4}, {"method": "int2", "n": 4}],
        "command": "first",
        "batch": 4,
    }


def test_two_runs_are_as_one(vlm, tmp_path, suite_file) -> None:
    """Rows in the suite's order, whatever the order of the parts; the report and the JSON as of one run, but for the
    command."""
    suite, places = suite_file(ENTRIES), [str(tmp_path / name) for name in ("a.json", "b.json")]
    for place, methods in zip(places, ("int8,int2", "evenly-spaced-4x"), strict=True):
        assert evaluate("--model", vlm, *QUICK, "--suite", suite, "--methods", methods, "--json", place) == 0
    whole = rows_of(vlm, tmp_path, "--suite", suite)
    report, picture = tmp_path / "r.md", tmp_path / "p.png"
    main(JoinConfig(suite, str(tmp_path / "joined.json"), places[::-1], str(picture), str(report)))
    found = json.loads((tmp_path / "joined.json").read_text())
    assert {row["method"]: row for row in found["rows"]} == whole
    assert [row["method"] for row in found["rows"]] == ["full", "int2", "evenly-spaced-4x", "int8"]
    assert " && " in found["command"] and "evenly-spaced-4x" in found["command"]
    assert report.read_text().count("| int2 |") == 1 and picture.stat().st_size > 0


def test_what_does_not_belong_together_is_refused(part) -> None:
    other = deepcopy(part)
    with pytest.raises(InputError, match="int2 is there twice"):
        join([part, other], ["full", "int2"])
    other["rows"][1]["kl"] = 2.0
    assert join([part, other], ["full", "int2"], replace=True)["rows"] == other["rows"], "the later one"
    with pytest.raises(InputError, match="part 2 is of another run than the first: its batch differs"):
        join([part, {**other, "batch": 8}], ["full", "int2"])
    other["rows"] = [{"method": "full", "n": 5}]
    with pytest.raises(InputError, match="its full cache answers otherwise"):
        join([part, other], ["full", "int2"])
    other["rows"] = [{"method": "full", "n": 4}, {"method": "int8", "n": 4}]
    with pytest.raises(InputError, match="no part has int3: measure them with --methods int3"):
        join([part, other], ["full", "int2", "int3", "int8"])
    assert join([part, {**other, "command": "second"}], ["full", "int8", "int2"])["command"] == "first && second"


def test_accuracy_by_data_set(tmp_path) -> None:
    tasks = ("emoji-place", "emoji-list", "easy-vqa-open", "words-read")
    rows = [
        {"method": "full", "accuracy": dict(zip(tasks, (0.5, 0.7, 0.9, 1.0), strict=True)), "n": 8},
        {"method": "a", "accuracy": dict(zip(tasks, (0.5, 0.6, 0.9, 0.4), strict=True)), "n": 8},
    ]
    (tmp_path / "f.json").write_text(json.dumps({"rows": rows, "command": "kvcapsule eval"}))
    report = tmp_path / "docs.md"
    report.write_text("# T\n\n<!-- table: sets -->\n<!-- end of table -->\n")
    by_dataset.main(BySetConfig(str(tmp_path / "f.json"), str(report), "sets"))
    text = report.read_text()
    assert "| method | emoji | easy-vqa | words | mean |" in text
    assert "| full | 0.600 | 0.900 | 1.000 | 0.833 |" in text
    assert "| a | 0.550 (5.0) | 0.900 (0.0) | 0.400 (60.0) | 0.617 (21.7) |" in text
    with pytest.raises(InputError, match="'line' is of none of emoji, easy-vqa, words"):
        by_dataset.by_set({"line": 1.0})
