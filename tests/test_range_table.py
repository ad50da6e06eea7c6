"""The table of versions in docs/models.md is what pytest's JUnit files say."""

from pathlib import Path

from support.range_table import NAME, main, read

JUNIT = """<testsuites><testsuite errors="1" failures="1" skipped="2" tests="9">
<properties><property name="transformers" value="5.20.2" /></properties>
<testcase name="a"><skipped message="GLM-4V has no video" /></testcase>
<testcase name="b"><skipped message="GLM-4V has no video" /></testcase>
</testsuite></testsuites>"""
MARKERS = f"Before.\n\n<!-- table: {NAME} -->\n<!-- end of table -->\n\nBehind.\n"


def test_counts(tmp_path: Path) -> None:
    file = tmp_path / "range.xml"
    file.write_text(JUNIT)
    outcome = read(file)
    assert (outcome.transformers, outcome.passed, outcome.failed) == ("5.20.2", 5, 2)
    assert dict(outcome.skipped) == {"GLM-4V has no video": 2}


def test_the_page_is_written_between_its_markers(tmp_path: Path) -> None:
    page, files = tmp_path / "models.md", [tmp_path / "a.xml", tmp_path / "b.xml"]
    page.write_text(MARKERS)
    files[0].write_text(JUNIT.replace('errors="1" failures="1"', 'errors="0" failures="0"'))
    assert main(["--page", str(page), str(files[0])]) == 0
    assert "| 5.20.2 | 7 | 0 | 2 |\n\n- GLM-4V has no video. Skipped on 5.20.2 (2).\n<!-- end" in page.read_text()
    files[1].write_text(JUNIT.replace("5.20.2", "5.21.1"))
    assert main(["--page", str(page), *map(str, files)]) == 1, "a version failed"
    text = page.read_text()
    assert "| 5.21.1 | 5 | 2 | 2 |" in text and "Skipped on 5.20.2 (2), 5.21.1 (2)." in text
    assert text.startswith("Before.") and text.endswith("Behind.\n")
