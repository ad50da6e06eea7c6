"""Folders of models that are damaged or bring code of their own: one ModelError, and nothing of them is run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcapsule.errors import ModelError
from kvcapsule.model_counts import read_config
from kvcapsule.vlm.loading import load_vlm


@pytest.fixture
def folder(vlm: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vlm, tmp_path / "vlm"))


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut weights": cut_weights,
    "empty weights": no_weights,
    "config of a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "deep config": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "text config of a number": lambda folder: change_config(folder, text_config=3),
    "unknown type": lambda folder: change_config(folder, model_type="other"),
    "tokenizer that is no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "tokenizer of a list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused(damage: str, folder: Path) -> None:
    DAMAGES[damage](folder)
    with pytest.raises(ModelError, match="cannot load the folder"):
        load_vlm(str(folder))


@pytest.mark.parametrize("name", ["./nothing", "runs/nothing", "nothing"])
def test_a_folder_that_is_missing_is_named(name: str, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match=rf"there is no folder {folder / name}, and from the Hub: "):
        load_vlm(name)


@pytest.mark.parametrize("load", [load_vlm, lambda name: read_config(name, None)])
def test_code_of_a_model_is_never_run(load: Callable[[str], object], folder: Path, monkeypatch) -> None:
    """Nor is a person asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = folder / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    own = {name: "own.Own" for name in ("AutoConfig", "AutoModelForImageTextToText")}
    change_config(folder, model_type="own", auto_map=own)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(str(folder))
    assert not mark.exists()
