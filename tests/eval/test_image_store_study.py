"""`python -m kvcapsule.eval.studies.image_store`: what it measures, on a few questions."""

import json

import pytest

from kvcapsule.eval.studies.image_store import METHODS, main


def test_the_study_compares_hits_with_misses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--questions", "2", "--max-new-tokens", "12", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in result["rows"]}
    assert tuple(rows) == METHODS and result["data"]["size"] == 2
    new, known = (rows[name] for name in METHODS[2:])
    for name in ("accuracy", "same_as_full", "same_as_capsule"):
        assert new[name] == known[name]
        assert 0 <= known[name] <= 1
    assert rows["full"]["same_as_full"] == rows["capsule"]["same_as_capsule"] == 1
    assert all(row["first_token_s"] > 0 for row in rows.values())


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--questions", "1", "--max-new-tokens", "1", "--capsule", "pages-vlm-transform"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}" in out for name in METHODS)
    assert main(["--questions", "0"]) == 2
