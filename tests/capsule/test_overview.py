"""What is known of a capsule without its weights, and which capsules a machine has."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.capsule_files import METRICS, RECIPE, ROW, fixed_capsule

from kvcapsule import CapsuleError
from kvcapsule.capsule import overview as module
from kvcapsule.capsule.overview import DOWNLOADED, ON_DISK, SHIPPED, Overview, capsules_here, overview
from kvcapsule.checkpoints import shipped_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fixed_capsule().save_pretrained(tmp_path / "deep" / "mine", recipe=RECIPE, metrics=METRICS)
    return tmp_path / "deep" / "mine"


def test_all_files_but_the_weights(folder: Path) -> None:
    known = overview(folder)
    assert (known.config.family, known.recipe, known.training) == ("kvcapsule", RECIPE, METRICS["train"])
    assert known.rows == METRICS["eval"]["rows"]
    assert known.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert known.training_rows is None and known.compression is None


def test_its_own_row_is_told_from_others_of_its_family(folder: Path) -> None:
    rows = [
        {**ROW, "family": "kvcapsule", "settings": {"capsule": name}, "compression16": times}
        for name, times in (("other", 2.0), ("runs/mine", 5.0))
    ]
    (folder / "metrics.json").write_text(json.dumps({"eval": {"rows": rows}}))
    known = overview(folder)
    assert known.compression == 5.0 and [known.is_of_this(row) for row in rows] == [False, True]


def test_of_training_where_nothing_was_evaluated(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"train": {"compression": 12.5}}')
    assert overview(folder).compression == 12.5


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.json", "[]", "no names and values"),
        ("recipe.yaml", "a: [", "cannot be read"),
        ("metrics.json", "{", "JSON"),
        ("metrics.json", '{"train": 3}', "train is 3, expected names and numbers"),
        ("metrics.json", '{"train": {"output_error": "x"}}', "train.output_error is 'x', expected a number"),
        ("metrics.json", '{"eval": 3}', "no rows of methods"),
        ("metrics.json", '{"eval": {"rows": [3]}}', "no rows of methods"),
        ("metrics.json", '{"eval": {"data": "pages"}}', "data is 'pages', expected names and values"),
        ("metrics.json", '{"eval": {"rows": [{}, {"settings": "x"}]}}', "settings of row 2 is 'x', expected dict"),
        ("metrics.json", '{"eval": {"rows": [{"accuracy": [1]}]}}', "accuracy of row 1"),
        ("metrics.json", '{"eval": {"rows": [{"accuracy": {"line": "x"}}]}}', "the accuracy line of row 1 is 'x'"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, file: str, content: str, said: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(CapsuleError, match=file) as error:
        overview(folder)
    assert said in str(error.value)


def test_a_folder_may_lack_what_loading_does_not_need(folder: Path) -> None:
    for name in ("metrics.json", "recipe.yaml", "README.md"):
        (folder / name).unlink()
    known = overview(folder)
    assert known.metrics == known.recipe == {} and known.rows == []


def test_a_name_in_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for what a killed save moved aside there, too."""

    names = Path.glob

    def refused(self: Path, pattern: str) -> Iterator[Path]:
        if self == tmp_path:
            raise PermissionError(13, "Permission denied", str(self))
        return names(self, pattern)

    monkeypatch.setattr(Path, "glob", refused)
    with pytest.raises(CapsuleError, match="there is no directory"):
        overview(tmp_path / "absent")


def test_a_name_behind_a_link_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.path.realpath", refused)
    with pytest.raises(CapsuleError, match="there is no directory"):
        overview(tmp_path / "absent")


def test_capsules_of_a_machine(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a" / "b" / "c" / "too-deep")
    shutil.copytree(folder, tmp_path / ".hidden")
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "recipe.yaml").write_text("a: [")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    here = list(capsules_here([tmp_path, tmp_path / "deep"]))
    known = [(place, capsule.name) for place, capsule in here if isinstance(capsule, Overview)]
    assert known[-1] == (ON_DISK, str(folder))
    assert {name for place, name in known if place == SHIPPED} < set(shipped_names()) and len(known) > 1
    (error,) = [capsule for _, capsule in here if isinstance(capsule, CapsuleError)]
    assert "broken" in str(error)


def test_downloaded_capsules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_downloaded", lambda: iter([("org/mine", folder), ("org/twice", folder)]))
    assert [(place, c.name) for place, c in capsules_here([]) if place == DOWNLOADED] == [(DOWNLOADED, "org/mine")]
