"""Files of suites, the capsules that they name, and runs of `kvcapsule eval` with them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

QUICK = ("--data.size", "4", "--batch", "4", "--max-new-tokens", "4")
CAPSULE = {"name": "half", "train": ["kvcapsule", "--ratio", 0.5]}


@pytest.fixture
def suite_file(tmp_path) -> Callable[..., str]:
    """suite_file([entry, ...], option=value): a suite named mine."""

    def build(entries: Any, **options: Any) -> str:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"options": options, "entries": entries}))
        return str(tmp_path / "mine.yaml")

    return build


def evaluate(*arguments: str) -> int:
    """`kvcapsule eval`, imported late: every test run loads this module for its fixtures."""
    from kvcapsule.eval.main import main

    return main(list(arguments))


def refused_line(capsys, *arguments: str) -> str:
    assert evaluate(*arguments) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("kvcapsule eval: ")
    return complaint


@pytest.fixture
def put_capsule(tmp_path, random_capsule) -> Callable[..., Path]:
    """put_capsule("half", 0.5): a capsule of that ratio in the suite's folder, as if it had been trained."""

    def build(name: str, ratio: float) -> Path:
        random_capsule(ratio, ratio, 196).save_pretrained(tmp_path / "capsules" / name)
        return tmp_path / "capsules"

    return build


def rows_of(vlm: str, tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    assert evaluate("--model", vlm, *QUICK, "--json", str(tmp_path / "eval.json"), *arguments) == 0
    return {row["method"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}


@pytest.fixture
def fake_training(monkeypatch, random_capsule) -> list[list[str]]:
    """The commands that were run, in place of running them."""
    ran: list[list[str]] = []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        ran.append(words)
        if "nonsense" in words:
            return SimpleNamespace(returncode=2, stderr="a warning\nkvcapsule train: no recipe 'nonsense'\n")
        random_capsule(0.5, 0.5, 196).save_pretrained(words[words.index("--output") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("kvcapsule.eval.suite.capsules.subprocess.run", run)
    return ran
