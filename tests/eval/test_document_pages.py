"""The generated tables of the documents show the committed results."""

import re
import shutil
from pathlib import Path

import pytest

from kvcapsule.errors import InputError
from kvcapsule.eval import pages
from kvcapsule.eval.pages import PAGES, RESULTS, PagesConfig
from kvcapsule.eval.report import markdown

ROOT = Path(__file__).resolve().parents[2]
GENERATED = re.compile("<!-- table: .*?<!-- end of table -->", re.DOTALL)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A copy of the results and of the pages that show them, as the working directory."""
    for name, (page, _) in PAGES.items():
        for file in (f"{RESULTS}/{name}", page):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_show_what_is_committed(tree: Path) -> None:
    """`make pages` changes nothing: no number was written by hand, and no form is out of date."""
    for page, _ in PAGES.values():
        text = (tree / page).read_text()
        # A page without markers is written as a whole; others may have tables that were not generated.
        generated = GENERATED if GENERATED.search(text) else re.compile(".*", re.DOTALL)
        altered = generated.sub(lambda table: table.group().replace("| full |", "| altered |"), text)
        (tree / page).write_text(altered)
    pages.rewrite(PagesConfig())
    for page in {page for page, _ in PAGES.values()}:
        assert (tree / page).read_text() == (ROOT / page).read_text(), f"{page}: run `make pages`"


def test_a_result_that_is_missing_is_named(tree: Path) -> None:
    (tree / RESULTS / "pages.json").unlink()
    with pytest.raises(InputError, match=r"pages\.json cannot be read"):
        pages.rewrite(PagesConfig())


def test_commands_name_the_page_of_today() -> None:
    """A result measured when its table stood on another page; merged runs, one command a line."""
    block = markdown.command_block(Path("docs/new.md"), "a --report docs/old.md --plot p && b", "docs/r.json")
    assert block == "Printed by these commands ([JSON](r.json)):\n\n```bash\na --report docs/new.md --plot p\nb\n```"
