"""The bytes of a cache over a long answer: what the command measures, writes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvcapsule.eval.studies import long_answer, long_answer_page

ROOT = Path(__file__).resolve().parents[2]
TOKEN = 4 * 2 * 2 * 32 * 4
"""Bytes of a token of pages-vlm: four layers, keys and values, two KV heads of 32, float32."""
TOKENS, BUDGET, BUFFER = 40, 12, 10


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one run has written to."""
    folder = tmp_path_factory.mktemp("growth")
    sizes = ["--tokens", str(TOKENS), "--questions", "2", "--budget_tokens", str(BUDGET), "--buffer", str(BUFFER)]
    files = [
        "--json",
        str(folder / "long.json"),
        "--plot",
        str(folder / "long.png"),
        "--report",
        str(folder / "long.md"),
    ]
    assert long_answer.main([*sizes, *files]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(written: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((written / "long.json").read_text())["rows"]}


def test_the_full_cache_grows_by_a_token_at_a_time(rows: dict[str, dict[str, Any]]) -> None:
    held = rows["full"]["bytes"]
    assert [after - held[0] for after in held] == [TOKEN * n for n in range(TOKENS)]
    assert held[0] > 196 * TOKEN


def test_r_kv_stays_where_it_is(rows: dict[str, dict[str, Any]]) -> None:
    """A buffer with room for 64 tokens, and the budget's rows from the second compression on; beside a capsule the
    same."""
    assert list(rows) == ["full", "r-kv", "r-kv, prompt as well", "transform", "transform + r-kv"]
    for alone, held in (("full", "r-kv"), ("transform", "transform + r-kv")):
        found = rows[held]["bytes"]
        assert len(set(found[2 * BUFFER :])) == 1
        queries = 4 * 4 * 8 * 32 * 4
        assert found[-1] - rows[alone]["bytes"][0] - queries - 64 * TOKEN == pytest.approx(BUDGET * TOKEN, abs=100)
    assert rows["r-kv, prompt as well"]["bytes"][0] < 2 * BUDGET * TOKEN + queries
    assert rows["transform"]["bytes"][-1] == rows["transform"]["bytes"][1], "the first 64 tokens have one room"


def test_agreement_is_with_the_full_cache(rows: dict[str, dict[str, Any]]) -> None:
    """A prompt of two hundred tokens that is cut to twelve is not answered alike."""
    assert rows["full"]["agreement"] == 1.0
    assert 0 <= rows["r-kv, prompt as well"]["agreement"] < 1


def test_the_page_shows_what_was_measured(written: Path, rows: dict[str, dict[str, Any]]) -> None:
    text = (written / "long.md").read_text()
    for name, row in rows.items():
        assert (
            f"| {name} | {row['bytes'][0]:,} | {max(row['bytes']):,} | {row['bytes'][-1]:,} | {row['agreement']:.3f} |"
            in text
        )
    assert (written / "long.png").read_bytes().startswith(b"\x89PNG")


def test_the_documents_show_what_is_committed() -> None:
    """docs/long-answer.md is that of eval/results/long-answer.json, and its picture is there."""
    found = json.loads((ROOT / "eval" / "results" / "long-answer.json").read_text())
    assert (ROOT / "docs" / "long-answer.md").read_text() == long_answer_page.page(found)
    assert found["tokens"] >= 300
    assert (ROOT / "docs" / "long-answer.png").is_file()
    assert "](long-answer.png)" in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens 0: at least 1"),
        (["--plot", "x.bmp"], "a picture's name ends in .png"),
        (["--report", "x.md"], "--report shows the files of --json and --plot"),
        (["--capsule", "no-such-capsule"], "no-such-capsule"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_be_used_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = long_answer.main(options)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
