"""`kvcapsule eval --capsule X` takes X's model and data, says what X was trained on, and warns of another model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.own_data import jsonl_of_pages

from kvcapsule.capsule.base_model import record_of
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.trained_with import record_of_data, write_places
from kvcapsule.capsule.training_rows import TrainingRows
from kvcapsule.data import source
from kvcapsule.data.batches import question_batches
from kvcapsule.data.row_digest import row_digest
from kvcapsule.data.source import SourceConfig
from kvcapsule.eval import main as command
from kvcapsule.eval.main import main
from kvcapsule.eval.report.merge_runs import merge

QUICK = ("--batch", "4", "--max-new-tokens", "4", "--timing", "false", "--methods", "int4")


@pytest.fixture
def own(vlm: str, model, make_capsule: Callable[[float], Capsule], tmp_path: Path) -> tuple[Path, str]:
    """A capsule of the model in a folder and of 2 of the 8 questions in a file; and the file."""
    data = SourceConfig(source=jsonl_of_pages(tmp_path / "own.jsonl", 8), prompt="question", split="all")
    questions = [q for batch in question_batches(source.load(data), 8) for q in batch]
    capsule = make_capsule(0.2)
    capsule.config = replace(
        capsule.config,
        base_model=Path(vlm).name,
        metadata={"model": record_of(vlm, model).to_dict(), **record_of_data(data)},
    )
    capsule.save_pretrained(tmp_path / "c", training_rows=TrainingRows.of(map(row_digest, questions[:2])))
    write_places(tmp_path / "c", vlm, data.source)
    return tmp_path / "c", data.source


def test_model_and_data_are_the_capsules(own: tuple[Path, str], vlm: str) -> None:
    folder, file = own
    config = command._parse(["--capsule", str(folder)])
    assert config.model == vlm and config.revision is None
    assert config.data == SourceConfig(source=file, prompt="question", split="test", size=200)
    # What is named is taken, and with other data the columns are not those of the capsule's.
    told = command._parse(["--capsule", str(folder), "--model", "org/vlm", "--data.source", "pages"])
    assert (told.model, told.data) == ("org/vlm", SourceConfig(split="test", size=200))
    split = command._parse(["--capsule", str(folder), "--data.split", "dev", "--data.image", "page"]).data
    assert (split.source, split.split, split.image, split.prompt) == (file, "dev", "page", "question")
    # Nothing that is named need be here.
    Path(f"{folder}.run", "places.json").unlink()
    told = command._parse(["--capsule", str(folder), "--model", "org/vlm", "--data.source", "x.jsonl"])
    assert (told.model, told.data.source, told.data.prompt) == ("org/vlm", "x.jsonl", "prompt")


def test_a_model_that_is_not_here_is_one_line(own: tuple[Path, str], capsys) -> None:
    folder, _ = own
    Path(f"{folder}.run", "places.json").unlink()
    assert main(["--capsule", str(folder), *QUICK]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "of the machine that trained it, which is not here: give --model" in err


def test_a_split_that_was_trained_on_is_not_measured(make_capsule, tmp_path: Path) -> None:
    for split, other in (("train", "test"), ("test", "validation"), ("test[:90%]", "validation")):
        capsule = make_capsule(0.2)
        capsule.config = replace(capsule.config, metadata=record_of_data(SourceConfig(split=split)))
        capsule.save_pretrained(tmp_path / "c")
        assert command._parse(["--capsule", str(tmp_path / "c")]).data.split == other


def test_questions_that_were_trained_on_are_refused_unless_allowed(own: tuple[Path, str], capsys) -> None:
    folder, _ = own
    every = ("--data.split", "all")
    assert main(["--capsule", str(folder), *QUICK, *every]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[-1].startswith(
        f"kvcapsule eval: 2 of 8 questions were among those that {folder} was trained on: more than one in twenty"
    )
    result = folder.parent / "eval.json"
    assert main(["--capsule", str(folder), *QUICK, *every, "--allow-seen", "true", "--json", str(result)]) == 0
    assert f"2 of 8 questions were among those that {folder} was trained on.\n" in capsys.readouterr().err
    assert json.loads(result.read_text())["seen"] == {"kvcapsule": 0.25}
    assert main(["--capsule", str(folder), *QUICK, "--data.source", "pages", "--data.size", "4", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "0 of 4 questions were among those" in printed.err
    assert json.loads(printed.out)["seen"] == {"kvcapsule": 0.0}


def test_another_model_is_said_once_and_refused_in_strict(own: tuple[Path, str], tmp_path: Path, capsys) -> None:
    folder, _ = own
    pages = ("--data.source", "pages", "--data.size", "4")
    words = ["--capsule", str(folder), "--model", "pages-vlm", *pages, *QUICK]
    assert main([*words, "--json", "-"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "arning" in line]
    assert len(said) == 1 and "and the weights of" in said[0]
    assert main([*words, "--strict", "true"]) == 2
    assert "are others" in capsys.readouterr().err.splitlines()[-1]
    capsule = Capsule.from_pretrained(folder)
    assert main(["--capsule", str(folder), *pages, *QUICK, "--strict", "true", "--json", "-"]) == 0
    out = capsys.readouterr()
    assert "arning" not in out.err and capsule.config.family in json.loads(out.out)["seen"]


def test_shares_of_parts_are_merged() -> None:
    full = {"method": "full"}
    parts = [
        {"rows": [full, {"method": name}], "command": name, **({} if seen is None else {"seen": {name: seen}})}
        for name, seen in (("a", 0.0), ("b", 0.5), ("c", None))
    ]
    assert merge(parts, ["full", "a", "b", "c"])["seen"] == {"a": 0.0, "b": 0.5}
    assert "seen" not in merge(parts[2:], ["full", "c"])
