"""Saving a capsule: what is read is what was written, and where it fails nothing is left half done."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from support.capsule_files import (
    CODECS,
    FILES,
    GEOMETRY,
    METRICS,
    RECIPE,
    configure,
    equal,
    fixed_capsule,
    limit_of_file_size,
    loadable,
)

from kvcapsule import Capsule, CapsuleError, GeometryError, atomic_files
from kvcapsule.capsule import hub
from kvcapsule.capsule.read import FILES as FILE_NAMES

# Saving and loading


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    family, codec = CODECS[name]
    capsule = loadable(fixed_capsule(family=family, codec=codec)).to(dtype)
    capsule.save_pretrained(tmp_path / "new" / "capsule")
    loaded = Capsule.from_pretrained(tmp_path / "new" / "capsule")
    assert loaded.config == capsule.config
    assert equal(loaded, capsule)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_files_are_exactly_five(saved: Path) -> None:
    assert set(os.listdir(saved)) == FILES == set(FILE_NAMES)
    assert [path.name for path in saved.parent.iterdir()] == ["tiny"]
    assert yaml.safe_load((saved / "recipe.yaml").read_text()) == RECIPE
    assert json.loads((saved / "metrics.json").read_text()) == METRICS
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "kvcapsule", "format_version": "1"}


def test_saving_again_writes_the_same_config_and_tensors(saved: Path) -> None:
    Capsule.from_pretrained(saved).save_pretrained(saved.parent / "again")
    assert (saved.parent / "again" / "config.json").read_bytes() == (saved / "config.json").read_bytes()
    assert equal(Capsule.from_pretrained(saved.parent / "again"), fixed_capsule())


def test_files_hold_plain_data_only(tmp_path: Path) -> None:
    metrics = {"train": {"loss": math.nan, "steps": torch.tensor(3), "rates": (1, 2)}}
    fixed_capsule().save_pretrained(tmp_path / "tiny", recipe={"output": Path("runs/demo")}, metrics=metrics)
    assert json.loads((tmp_path / "tiny" / "metrics.json").read_text()) == {
        "train": {"loss": None, "steps": 3, "rates": [1, 2]}
    }
    assert yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text()) == {"output": "runs/demo"}
    with pytest.raises(TypeError, match=r"metrics\.train\.net is a Linear"):
        fixed_capsule().save_pretrained(tmp_path / "other", metrics={"train": {"net": torch.nn.Linear(1, 1)}})
    assert os.listdir(tmp_path) == ["tiny"]


def test_config_is_read_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert hub.read_config(saved) == configure()
    with pytest.raises(CapsuleError, match=r"tiny is not a capsule directory: it lacks model\.safetensors\."):
        Capsule.from_pretrained(saved)


def test_another_geometry_is_refused_with_both(saved: Path) -> None:
    other = replace(GEOMETRY, kv_heads=4, rotary="mrope")
    with pytest.raises(GeometryError) as caught:
        Capsule.from_pretrained(saved).require_geometry(other)
    assert str(GEOMETRY.to_dict()) in str(caught.value) and str(other.to_dict()) in str(caught.value)
    assert "kv_heads: 2 != 4" in str(caught.value)


def test_saving_replaces_a_capsule_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    fixed_capsule(salt=1).save_pretrained(saved)
    assert equal(Capsule.from_pretrained(saved), fixed_capsule(salt=1))
    (tmp_path / "empty").mkdir()
    fixed_capsule().save_pretrained(tmp_path / "empty")
    (tmp_path / "link").symlink_to(saved)
    fixed_capsule(salt=2).save_pretrained(tmp_path / "link")
    assert equal(Capsule.from_pretrained(saved), fixed_capsule(salt=2)) and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "tiny"]


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "README.md"])
def test_saving_over_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).write_text('{"model_type": "llava"}')
    with pytest.raises(CapsuleError, match=rf"not a capsule directory \(it holds {name}\)"):
        fixed_capsule().save_pretrained(tmp_path / "work")
    assert os.listdir(tmp_path / "work") == [name]
    with pytest.raises(CapsuleError, match="is a file"):
        fixed_capsule().save_pretrained(tmp_path / "work" / name)


def test_an_extra_file_beside_a_capsule_is_not_deleted(saved: Path) -> None:
    (saved / "notes.txt").touch()
    with pytest.raises(CapsuleError, match=r"it holds notes\.txt"):
        fixed_capsule(salt=1).save_pretrained(saved)
    assert equal(Capsule.from_pretrained(saved), fixed_capsule())


# Failures while saving


def full_disk_in_the_second_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write = atomic_files.write

    def fail_half_way(path: Path, content: bytes) -> None:
        if path.name == "model.safetensors":
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(atomic_files, "write", fail_half_way)


def full_disk_at_the_last_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == len(FILES):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fail", [full_disk_in_the_second_file, full_disk_at_the_last_sync, limit_of_file_size])
def test_disk_full(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None]
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for target in (saved, tmp_path / "new"):
        with monkeypatch.context() as patch:
            fail(patch)
            with pytest.raises(CapsuleError) as caught:
                fixed_capsule(salt=1).save_pretrained(target, recipe=RECIPE)
        message = str(caught.value)
        assert f"cannot save the capsule to {target}: " in message and "\n" not in message
        needed, free = (
            int(number.replace(",", ""))
            for number in (message.split(" bytes")[0].split()[-1], message.split(" are free")[0].split()[-1])
        )
        fixed_capsule(salt=1).save_pretrained(tmp_path / "measure", recipe=RECIPE, card_name=target.name)
        assert needed == sum(path.stat().st_size for path in (tmp_path / "measure").iterdir())
        shutil.rmtree(tmp_path / "measure")
        assert 0 <= free <= shutil.disk_usage(tmp_path).total
        assert ("untouched" in message) == target.exists()
    assert os.listdir(tmp_path) == ["tiny"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert equal(Capsule.from_pretrained(saved), fixed_capsule())


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_puts_the_old_capsule_back(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    rename, calls = Path.rename, []

    def fail_once(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    with monkeypatch.context() as patch:
        # As on a file system that cannot exchange folders.
        patch.setattr("kvcapsule.atomic_files.exchange", lambda one, other: False)
        patch.setattr(Path, "rename", fail_once)
        with pytest.raises(CapsuleError, match="untouched"):
            fixed_capsule(salt=1).save_pretrained(saved)
    assert os.listdir(saved.parent) == ["tiny"]
    assert equal(Capsule.from_pretrained(saved), fixed_capsule())


def test_an_interrupt_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fixed_capsule(salt=1).save_pretrained(saved)
    assert os.listdir(saved.parent) == ["tiny"]
    assert equal(Capsule.from_pretrained(saved), fixed_capsule())
