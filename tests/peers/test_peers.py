"""The committed comparison with code of others (tests/peers/compare.py): nothing differs that is not explained."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCORES = {"SnapKV", "PyramidKV", "AdaKV", "StreamingLLM", "TOVA", "KIVI, 2 bits", "KIVI, 4 bits"}
"""What has to be among them."""


def comparisons() -> list[dict[str, Any]]:
    value = json.loads((ROOT / "eval" / "results" / "peers.json").read_text(encoding="utf-8"))
    assert {"kvpress", "optimum-quanto", "transformers", "torch"} <= set(value["versions"]) and value["machine"]
    found: list[dict[str, Any]] = value["comparisons"]
    return found


def test_what_differs_is_explained() -> None:
    for c in comparisons():
        assert c["compared"] > 0, c["score"]
        if c["difference"] is None:
            assert c["differ"] == 0, c["score"]
        else:
            assert c["differ"] > 0 and c["differ_without"] == 0, c["score"]


def test_every_score_is_compared() -> None:
    assert {c["score"] for c in comparisons()} >= SCORES


def test_the_page_names_every_difference() -> None:
    """docs/methods.md has a row for each comparison, with its counts."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for c in comparisons():
        row = next((line for line in page.splitlines() if line.startswith(f"| {c['score']} |")), "")
        assert f"| {c['differ']:,} of {c['compared']:,} |" in row, c["score"]
