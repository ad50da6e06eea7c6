"""Folders that hold no sound capsule, and names that lead nowhere: every fault is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.capsule_files import GEOMETRY, equal, fixed_capsule

from kvcapsule import Capsule, CapsuleError
from kvcapsule.capsule import hub
from kvcapsule.checkpoints import shipped, shipped_names

# Damaged capsules


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, kept: int) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(CapsuleError) as caught:
        Capsule.from_pretrained(saved)
    message = str(caught.value)
    assert str(path) in message and "download the capsule again" in message
    if kept == -1:
        assert f"{len(content) - 1:,} bytes where its header announces {len(content):,}" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!DOCTYPE html><html><head><title>504 Gateway Time-out</title></head></html>", "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n", "git lfs pull"),
        ((30).to_bytes(8, "little") + b'{"a": {"dtype": "F32"}, "b": 0}' * 4, "no sound safetensors file"),
    ],
)
def test_weights_that_are_something_else(saved: Path, content: bytes, expected: str) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CapsuleError, match=expected):
        Capsule.from_pretrained(saved)


def test_wrong_tensors_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.0.keys.theta"] = tensors["layers.0.keys.theta"][:, :, :-1].contiguous()
    tensors["layers.1.values.extra"] = tensors.pop("layers.1.values.mean")
    tensors["layers.1.keys.kept"] = tensors["layers.1.keys.kept"].float()
    save_file(tensors, path, {"format": "kvcapsule", "format_version": "1"})
    with pytest.raises(CapsuleError) as caught:
        Capsule.from_pretrained(saved)
    for fault in (
        "layers.0.keys.theta has the shape (2, 8, 3) and not (2, 8, 4)",
        "layers.1.values.mean is missing",
        "layers.1.values.extra is unexpected",
        "layers.1.keys.kept holds torch.float32 and not torch.int64",
    ):
        assert fault in str(caught.value)


def test_weights_of_another_config(saved: Path) -> None:
    change_config(saved, geometry={**GEOMETRY.to_dict(), "kv_heads": 1})
    with pytest.raises(CapsuleError, match=r"basis has the shape \(2, 6, 8\) and not \(1, 6, 8\)"):
        Capsule.from_pretrained(saved)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "has format None in its metadata"),
        ({"format": "pt"}, "has format 'pt'"),
        (
            {"format": "kvcapsule", "format_version": "2"},
            "has format_version '2' in its metadata, where config.json asks for '1'",
        ),
    ],
)
def test_weights_of_another_format(saved: Path, metadata: dict[str, str] | None, expected: str) -> None:
    save_file(load_file(saved / "model.safetensors"), saved / "model.safetensors", metadata)
    with pytest.raises(CapsuleError, match=expected):
        Capsule.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"format_version": 3},
            r"config\.json: capsule format version 3; this version of kvcapsule reads versions 1 and 2",
        ),
        ({"family": "wavelet"}, r"config\.json: unknown codec family 'wavelet'"),
        ({"family": ["kvcapsule"]}, r"config\.json: unknown codec family"),
        ({"geometry": {"layers": 2}}, r"config\.json: capsule config cannot be used"),
        ({"codec": {"tile": 8, "depth": 3}}, "has no field depth"),
        ({"geometry": {**GEOMETRY.to_dict(), "layers": 3}}, r"config\.json.* 3 layers"),
        ({"geometry": {**GEOMETRY.to_dict(), "layers": "2"}}, r"config\.json.* layers"),
    ],
)
def test_wrong_config(saved: Path, changes: dict[str, Any], expected: str) -> None:
    change_config(saved, **changes)
    with pytest.raises(CapsuleError, match=expected):
        Capsule.from_pretrained(saved)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not JSON"),
        (b'{"format_version": 1,', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is not the config of a capsule"),
        (b'{"model_type": "llava"}', "the model_type 'llava' of a model"),
    ],
)
def test_config_that_is_something_else(saved: Path, content: bytes, expected: str) -> None:
    (saved / "config.json").write_bytes(content)
    for read in (hub.read_config, Capsule.from_pretrained):
        with pytest.raises(CapsuleError, match=expected):
            read(saved)


# Names


def test_names_that_lead_nowhere(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CapsuleError) as caught:
        Capsule.from_pretrained("no-such-capsule")
    message = str(caught.value)
    assert (
        "'no-such-capsule'" in message
        and str(Path.cwd() / "no-such-capsule") in message
        and "organisation/name" in message
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CapsuleError, match=r"empty is not a capsule directory: it lacks config\.json, model\.safetensors"
    ):
        Capsule.from_pretrained(tmp_path / "empty")
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent/capsule", Path("absent/capsule")):
        with pytest.raises(CapsuleError, match=r"there is no directory .*absent"):
            hub.read_config(name)
    with pytest.raises(CapsuleError, match="is a file"):
        Capsule.from_pretrained(saved / "config.json")
    with pytest.raises(CapsuleError, match="no capsule ''"):
        Capsule.from_pretrained("")
    with pytest.raises(CapsuleError, match="only repositories on the Hub have revisions"):
        Capsule.from_pretrained(saved, revision="main")


def test_shipped_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all((shipped(name) or tmp_path) / "config.json" for name in shipped_names())
    assert [shipped(name) for name in ("no-such", "", ".", "..", "../checkpoints", "org/name", str(tmp_path))] == [
        None
    ] * 7
    monkeypatch.setattr("kvcapsule.checkpoints.HERE", tmp_path)
    fixed_capsule().save_pretrained(tmp_path / "tiny-demo")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert shipped("tiny-demo") == tmp_path / "tiny-demo" and shipped_names() == ["model", "tiny-demo"]
    assert equal(Capsule.from_pretrained("tiny-demo"), fixed_capsule())
    with pytest.raises(CapsuleError, match=r"\(shipped: tiny-demo\)"):
        Capsule.from_pretrained("tiny-dmo")
