"""`kvcapsule show` and `kvcapsule list`."""

import json
from pathlib import Path

import pytest
from support.capsule_files import METRICS, RECIPE, fixed_capsule

from kvcapsule.cli import main
from kvcapsule.cli.errors import WRONG_INPUT


def test_what_a_shipped_capsule_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "pages-vlm-cross-layer"]) == 0
    out = capsys.readouterr().out
    for text in ("cross-layer", "196 visual tokens", "20.0x fewer bytes", "pages, split train", "800 questions"):
        assert text in out
    row = next(line for line in out.splitlines() if line.startswith("cross-layer"))
    assert row.split() == ["cross-layer", "20.0x", "0.998", "3.8e-05", "0.954"]
    assert "kvcapsule eval --capsule pages-vlm-cross-layer" in out and "transcribe" not in out
    assert main(["show", "pages-vlm-cross-layer", "--wide"]) == 0
    assert "transcribe" in capsys.readouterr().out


def test_show_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsule = fixed_capsule()
    capsule.save_pretrained(tmp_path / "mine", recipe=RECIPE, metrics=METRICS)
    assert main(["show", str(tmp_path / "mine"), "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"] == json.loads((tmp_path / "mine" / "config.json").read_text())
    assert (values["recipe"], values["metrics"], values["training_rows"]) == (RECIPE, METRICS, None)


def test_a_capsule_of_which_nothing_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed_capsule().save_pretrained(tmp_path / "my capsule")
    assert main(["show", str(tmp_path / "my capsule")]) == 0
    out = capsys.readouterr().out
    assert "org/vlm at a1b2c3" in out and "measured on" not in out
    assert f"--capsule '{tmp_path}/my capsule'" in out


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "no-such-capsule"]) == WRONG_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed_capsule().save_pretrained(tmp_path / "mine", metrics={"train": {"compression": 3.0, "output_error": 0.25}})
    assert main(["list", str(tmp_path), "--wide"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (mine,) = [line.split() for line in lines if line.startswith(str(tmp_path))]
    assert (
        mine[1:4] == ["org/vlm", "token-subset", "(KVCapsule)"]
        and mine[4] == "3.0x"
        and mine[-4:-1] == ["disk", "8", "0.2500"]
    )
    assert any(line.startswith("pages-vlm-transform ") and " shipped" in line for line in lines)
    assert lines[-1].endswith(" capsules")


def test_damaged_ones_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed_capsule().save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "recipe.yaml").write_text("a: [")
    assert main(["list", str(tmp_path)]) == 0
    assert "recipe.yaml cannot be read" in capsys.readouterr().out
    assert main(["list", str(tmp_path), "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert "recipe.yaml" in values[-1]["error"] and values[0]["place"] == "shipped"


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path / "absent")]) == WRONG_INPUT
    assert "there is no folder" in capsys.readouterr().err
