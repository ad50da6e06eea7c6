"""The table of a suite in a document."""

from pathlib import Path

import pytest
from support.suite_files import CAPSULE, refused_line, rows_of

from kvcapsule.eval.report import markdown

DOCUMENT = (
    "# Title\n\nBefore.\n\n<!-- table: mine -->\nold\n<!-- end of table -->\n\nBehind.\n\n<!-- table: other -->\n<!--"
    " end of table -->\n"
)


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_report_is_refreshed_in_its_place_alone(vlm, tmp_path, suite_file) -> None:
    report = tmp_path / "docs" / "results.md"
    report.parent.mkdir()
    report.write_text(DOCUMENT)
    entries = [{"method": "int2"}, {"method": "evenly-spaced", "compression": 4}]
    drawn = ("--plot", str(tmp_path / "pictures" / "mine.png"))
    arguments = ("--suite", suite_file(entries), "--report", str(report), *drawn)
    rows = rows_of(vlm, tmp_path, *arguments)
    first = report.read_text()
    rows_of(vlm, tmp_path, *arguments)
    assert report.read_text() == first
    before, behind = DOCUMENT.split("old\n")
    assert first.startswith(before) and first.endswith(behind) and "old" not in first
    head, _, *cells = _cells(first)
    assert [row[0] for row in cells] == list(rows)
    tasks = list(rows["full"]["accuracy"])
    assert head == [
        *("method", "compression as run", "compression vs 16 bit", "visual KV bytes per question"),
        *("all KV bytes per question", *tasks),
        *("mean accuracy", "loss in points", "same answers", "KL in nats", "decoder bytes"),
    ]
    means = [sum(row["accuracy"].values()) / len(tasks) for row in rows.values()]
    for line, row, score in zip(cells, rows.values(), means, strict=True):
        found = dict(zip(head, line, strict=True))
        assert found["visual KV bytes per question"] == f"{row['visual_kv_bytes']:,}"
        assert found["all KV bytes per question"] == f"{row['kv_bytes']:,}"
        assert found["compression vs 16 bit"] == f"{row['compression16']:.2f}x"
        assert float(found["mean accuracy"]) == pytest.approx(score, abs=6e-4)
        assert float(found["loss in points"]) == pytest.approx(100 * (means[0] - score), abs=0.06)
        assert not found["loss in points"].startswith("-0.0")
    assert f"\nkvcapsule eval --model {Path(vlm).name}" in first
    # Where lines break depends on the name of the machine's CPU.
    text = " ".join(first.split())
    assert "seed 0" in text and " threads" in text
    assert "[JSON](../eval.json)" in first and "](../pictures/mine.png)" in first
    assert str(tmp_path) not in first


def test_a_report_has_times_and_the_hosts_bytes_where_there_are_such() -> None:
    """Of all rows."""
    row = {
        **dict.fromkeys(("compression", "compression16"), 2.0),
        **dict.fromkeys(("visual_kv_bytes", "kv_bytes", "parameter_bytes"), 5),
    }
    row |= {
        "accuracy": {"line": 0.5},
        "agreement": 1.0,
        "kl": None,
        "host_kv_bytes": 0,
        "prefill_ratio": None,
        "tokens_per_s_ratio": None,
    }
    plain, *_ = _cells(markdown.table([{**row, "method": "full"}, {**row, "method": "a"}]))
    assert not {"bytes on the host", "prefill time vs full", "tokens/s vs full"} & set(plain)
    timed = [
        {**row, "method": m, "prefill_ratio": p, "tokens_per_s_ratio": 0.5, "host_kv_bytes": 7}
        for m, p in (("full", 1), ("a", 1.25))
    ]
    head, _, full, a = _cells(markdown.table(timed))
    assert [line[head.index("prefill time vs full")] for line in (full, a)] == ["1.00", "1.25"]
    assert [line[head.index("bytes on the host")] for line in (full, a)] == ["7", "7"]


def test_a_report_that_is_not_there_is_made(vlm, tmp_path, suite_file) -> None:
    arguments = ("--suite", suite_file([{"method": "int2"}]), "--report", str(tmp_path / "new" / "report.md"))
    rows_of(vlm, tmp_path, *arguments)
    first = (tmp_path / "new" / "report.md").read_text()
    assert "| int2 |" in first
    rows_of(vlm, tmp_path, *arguments)
    assert (tmp_path / "new" / "report.md").read_text() == first


@pytest.mark.parametrize(
    "text",
    [
        "# Nothing\n",
        "<!-- table: mine -->\n",
        "<!-- end of table -->\n<!-- table: mine -->\n",
        2 * "<!-- table: mine -->\n<!-- end of table -->\n",
        # The end is another table's: what lies between would be lost.
        "<!-- table: mine -->\n<!-- table: other -->\n<!-- end of table -->\n",
    ],
)
def test_a_report_without_a_place_is_refused_before_the_run(
    tmp_path, suite_file, fake_training, capsys, text: str
) -> None:
    report = tmp_path / "report.md"
    report.write_text(text)
    refused = refused_line(
        capsys,
        "--suite",
        suite_file([CAPSULE]),
        "--report",
        str(report),
        "--suite-capsules",
        str(tmp_path / "capsules"),
    )
    assert "<!-- table: mine -->" in refused and report.read_text() == text
    assert not fake_training


def test_the_shipped_document_has_the_place() -> None:
    markdown.require_place(Path(__file__).resolve().parents[2] / "docs" / "results-tables.md", "rate-distortion")
