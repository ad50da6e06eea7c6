"""The site of the documents (mkdocs.yml, docs/site/): every page has a place, nothing is loaded from the network, and
the messages of the troubleshooting page are those of the code. `make docs` builds it, which takes too long for a
test."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import kvcapsule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "site"))
import site_content as content

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"reference/python.md", "reference/methods.md", "reference/commands.md"}


def named_pages(nav: object) -> Iterator[str]:
    """The pages of mkdocs.yml's nav."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list):
        for item in nav:
            yield from named_pages(item)
    elif isinstance(nav, dict):
        for item in nav.values():
            yield from named_pages(item)


def test_every_page_has_one_place() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = list(named_pages(yaml.safe_load(text[text.index("\nnav:") :])["nav"]))
    assert sorted(pages) == sorted(GENERATED | {name for name in content.reachable() if name.endswith(".md")})


def test_files_that_pages_link_to_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[a](docs/a.md#x) [w](https://example.org)\n```\n[no](code.md)\n```\n")
    (tmp_path / "docs" / "a.md").write_text("![p](p.png) [back](../README.md)")
    (tmp_path / "docs" / "p.png").write_bytes(b"")
    assert content.reachable(tmp_path) == ["README.md", "docs/a.md", "docs/p.png"]
    (tmp_path / "docs" / "p.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"docs/p\.png"):
        content.reachable(tmp_path)


def test_lists_and_tables_get_the_blank_line_that_they_need() -> None:
    text = "a\n- b\n  more\n- c\n\nd\n|e|\n|-|\n```\nx\n- y\n```\n1. f\n"
    expected = "a\n\n- b\n  more\n- c\n\nd\n\n|e|\n|-|\n```\nx\n- y\n```\n\n1. f\n"
    assert content.with_blank_lines(text) == expected == content.with_blank_lines(expected)


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ('<script src="https://a.org/x.js"></script>', ["https://a.org/x.js"]),
        ("<link href=//b.org/x.css rel=stylesheet>", ["//b.org/x.css"]),
        ('<img alt="x" src="http://c.org/x.png">', ["http://c.org/x.png"]),
        ("a { background: url(https://d.org/x.woff) }", ["https://d.org/x.woff"]),
        ('@import "https://e.org/x.css";', ["https://e.org/x.css"]),
        ('<a href="https://f.org/">f</a> <script src="x.js"></script> <link rel=canonical href=https://g.org>', []),
        ("url(data:image/svg+xml;charset=utf-8,<svg xmlns='http://www.w3.org/2000/svg'/>)", []),
    ],
)
def test_what_a_browser_would_fetch(text: str, addresses: list[str]) -> None:
    assert content.network_loads(text) == addresses


def test_the_reference_has_all_public_names() -> None:
    names = [name for section in content.PUBLIC.values() for name in section]
    assert sorted(names) == sorted(set(kvcapsule.__all__) - {"__version__"})
    page = content.python_page(kvcapsule._HOME)
    assert page.count("\n::: kvcapsule.") == len(names) and "\n::: kvcapsule.inference.attach.attach\n" in page


def test_drawings_are_whole() -> None:
    """And say in words what they show."""
    drawings = sorted((ROOT / "docs" / "drawings").glob("*.svg"))
    assert drawings
    for drawing in drawings:
        assert ElementTree.parse(drawing).getroot().get("aria-label"), drawing.name


def literal(node: ast.AST) -> str:
    """A text of the code, with a null character for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(map(literal, node.values)) if isinstance(node, ast.JoinedStr) else "\0"


def test_messages_are_those_of_the_code() -> None:
    """`...` stands for anything."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 40
    files = [path for name in ("kvcapsule", "training", "eval") for path in (ROOT / name).rglob("*.py")]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in files)
    texts = {
        literal(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)
    }

    def known(message: str) -> bool:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
        return any(pattern.search(text) for text in texts)

    assert [message for message in messages if not known(message)] == []
