"""kvcapsule methods, and the page of policies: every method says what it is."""

import json
import re
from pathlib import Path

import pytest

from kvcapsule.cli import main
from kvcapsule.cli.methods import MethodInfo, known_methods
from kvcapsule.codec import FAMILIES
from kvcapsule.policy import (
    POLICIES,
    TEXT_POLICIES,
)

# The command and the page


def test_methods_prints_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--wide"]) == 0
    out = capsys.readouterr().out
    for name in (*FAMILIES, *POLICIES, *TEXT_POLICIES):
        assert re.search(rf"^{re.escape(name)} +(codec|policy|text policy) +", out, re.MULTILINE), name
    assert "2404.14469" in out and "kernel=7" in out


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {"codec": FAMILIES, "policy": POLICIES, "text policy": TEXT_POLICIES}
    assert [(m["name"], m["kind"]) for m in found] == [(name, kind) for kind, names in kinds.items() for name in names]
    by_name = {m["name"]: m for m in found}
    assert by_name["snapkv"] == {
        "name": "snapkv",
        "kind": "policy",
        "summary": (
            "SnapKV (arXiv 2404.14469): each KV head keeps the visual tokens that the prompt's last queries attend to, "
            "neighbours included."
        ),
        "papers": ["2404.14469"],
        "required": ["retention"],
        "defaults": {"window": 32, "kernel": 7, "pooling": "avg"},
    }
    assert by_name["kvcapsule"]["required"] == ["tile"] and by_name["kvcapsule"]["papers"] == ["2605.16439"]
    assert by_name["transform"]["papers"] == [], "those that it names are akin, not its source"


def test_every_method_says_what_it_is() -> None:
    papers = {method.name: method.papers for method in known_methods()}
    assert {name: papers[name] for name in ("streaming-llm", "h2o", "pyramidkv", "kivi")} == {
        "streaming-llm": ["2309.17453"],
        "h2o": ["2306.14048"],
        "pyramidkv": ["2406.02069"],
        "kivi": ["2402.02750"],
    }
    for method in known_methods():
        assert isinstance(method, MethodInfo)
        assert method.summary.endswith("."), method.name


def test_methods_takes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["methods", "--jsn"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("kvcapsule methods: ")


def test_the_page_has_a_short_section_for_each() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `([^`]+)`[^\n]*\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S))
    assert list(sections) == [*FAMILIES, *POLICIES, *TEXT_POLICIES]
    for method in known_methods():
        section = sections[method.name]
        assert 0 < len(section.strip().splitlines()) <= 10, method.name
        assert all(paper in section for paper in method.papers), method.name
