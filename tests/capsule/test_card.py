"""A capsule's model card: what it says, and how measurements reach it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.capsule_files import FILES, RECIPE, ROW, configure, fixed_capsule, limit_of_file_size

from kvcapsule import CapsuleError
from kvcapsule.capsule.card import model_card, renamed
from kvcapsule.capsule.write import update_metrics


def front_matter(card: str) -> dict[str, Any]:
    values = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(values, dict)
    return values


def test_card(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert front_matter(card) == {
        "base_model": "org/vlm",
        "library_name": "kvcapsule",
        "tags": ["kv-cache", "compression", "vision-language"],
    }
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "README.md", "exec")
    assert 'load_vlm("org/vlm", revision="a1b2c3")' in snippet and 'Capsule.from_pretrained("tiny", ' in snippet
    assert "`kvcapsule generate --capsule tiny --image image.png" in card
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert (
        "| method | settings | accuracy, transcribe | accuracy, count | agreement | KL | visual KV bytes | KV bytes |"
        " parameter bytes | compression | prefill, ratio | tokens/s, ratio | n |" in table
    )
    assert (
        "| capsule | r=0.5 | 0.9375 | 1 | 0.9688 | 0.0125 | 123,456 | 234,567 | 3,456 | 2.5 | 1.25 | 0.75 | 200 |"
        in table
    )
    assert any(line.startswith("| full\\|cache | r=0.5 | – | – |") for line in table)
    assert "| loss | 0.0625 |" in table
    assert "not measured" not in card.lower()
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == RECIPE


def test_measurements_reach_the_file_and_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    fixed_capsule().save_pretrained(folder, recipe=RECIPE, metrics={"train": {"loss": 0.5}}, card_name="org/tiny")
    before = (folder / "README.md").read_text()
    (folder / "README.md").write_text(before + "\nWritten by hand.\n")
    layered = {**ROW, "settings": {"key_ratios": [0.5, 0.25]}}
    update_metrics(folder, {"eval": {"command": "kvcapsule eval --capsule tiny --seed 1", "rows": [layered]}})
    card = (folder / "README.md").read_text()
    assert (
        "| capsule | key_ratios=0.5/0.25 | 0.9375 |" in card
        and "Printed by `kvcapsule eval --capsule tiny --seed 1`." in card
    )
    assert "Not measured yet" in before and "Not measured" not in card
    assert card.startswith(before.split("## Measured")[0]) and card.endswith(
        "## Recipe" + before.split("## Recipe")[1] + "\nWritten by hand.\n"
    )
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["train"] == {"loss": 0.5} and saved["eval"]["rows"] == [layered]
    update_metrics(folder, {"eval": None})
    assert (folder / "README.md").read_text() == before + "\nWritten by hand.\n"
    assert os.listdir(tmp_path) == ["tiny"] and set(os.listdir(folder)) == FILES


def test_measurements_that_cannot_be_put_in(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        limit_of_file_size(patch)
        with pytest.raises(CapsuleError, match=r"cannot save .*untouched"):
            update_metrics(saved, {"train": {"loss": "x" * 2000}})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before and os.listdir(tmp_path) == ["tiny"]
    for damaged in ("{", "[]"):
        (saved / "metrics.json").write_text(damaged)
        with pytest.raises(CapsuleError, match=r"metrics\.json is damaged"):
            update_metrics(saved, {})
    with pytest.raises(CapsuleError, match="is not a capsule directory"):
        update_metrics(tmp_path, {})


def test_card_without_measurements_says_so(tmp_path: Path) -> None:
    for metrics in (None, {}, {"train": {"loss": 1.0}}, {"eval": {"rows": []}}):
        card = model_card(configure(), None, metrics, "org/tiny")
        assert "Not measured yet: run `kvcapsule eval --capsule org/tiny`." in card
        assert "No recipe was saved" in card
    local = model_card(configure(base_model="mine", metadata={"model": {"local": True}}), None, None)
    assert "base_model" not in front_matter(local) and 'load_vlm("mine")  # the path of this folder' in local


def test_the_licence_is_the_base_models_or_none() -> None:
    license = {"license": "other", "license_name": "gemma", "license_link": "https://example.org/terms"}
    of_model = front_matter(model_card(configure(metadata={"model": {"license": license}}), None, None))
    assert {key: of_model[key] for key in license} == license
    assert not [key for key in front_matter(model_card(configure(), None, None)) if key.startswith("license")]


def test_a_card_is_renamed_in_its_code_and_its_commands() -> None:
    evaluation = {"command": "kvcapsule eval --capsule runs/c --capsule runs/c-2", "rows": [ROW]}
    card = renamed(model_card(configure(), None, {"eval": evaluation}, "runs/c"), "org/new")
    assert 'from_pretrained("org/new", device' in card and "generate --capsule org/new --image" in card
    assert "`kvcapsule eval --capsule org/new --capsule runs/c-2`" in card
    assert "run `kvcapsule eval --capsule org/new`" in renamed(model_card(configure(), None, None, "c"), "org/new")
    assert renamed("no code", "org/new") == "no code"
