"""A capsule's files: what is read is what was written, nothing is left half done, every fault is named. hub_server.py is the Hub."""

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcapsule import Capsule, CapsuleConfig, CapsuleError, GeometryError, KVGeometry, files, hub
from kvcapsule.card import model_card
from kvcapsule.checkpoints import shipped, shipped_names
from kvcapsule.cli import push as push_command
from kvcapsule.codec import FAMILIES, CodecConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig
from kvcapsule.codec.transform import TransformConfig

GOLDEN = Path(__file__).parent / "golden" / "capsule-v1"
FORMAT = Path(__file__).resolve().parents[1] / "checkpoints" / "FORMAT.md"
FILES = {"config.json", "model.safetensors", "README.md", "recipe.yaml", "metrics.json"}
GEOMETRY = KVGeometry(model_type="llava", layers=2, query_heads=4, kv_heads=2, head_dim=4, rotary="1d")
RECIPE = {"model": "org/vlm", "ratio": 0.5, "tiles": [8], "nested": {"seed": 3, "note": None}}
ROW = {
    "method": "capsule",
    "settings": {"r": 0.5},
    "accuracy": {"transcribe": 0.9375, "count": 1.0},
    "agreement": 0.96875,
    "kl": 0.0125,
    "visual_kv_bytes": 123456,
    "kv_bytes": 234567,
    "parameter_bytes": 3456,
    "compression": 2.5,
    "prefill_ratio": 1.25,
    "tokens_per_s_ratio": 0.75,
    "n": 200,
}
METRICS = {"train": {"loss": 0.0625}, "eval": {"rows": [ROW, {**ROW, "method": "full|cache", "accuracy": {"count": None}}]}}


def configure(**changes: Any) -> CapsuleConfig:
    codec = KVCapsuleConfig(tile=8, key_ratios=(0.5,) * 2, value_ratios=(0.75,) * 2)
    config = CapsuleConfig("kvcapsule", codec, GEOMETRY, base_model="org/vlm", base_revision="a1b2c3", metadata={"samples": 12})
    return replace(config, **changes)


def fixed_capsule(salt: int = 0, **changes: Any) -> Capsule:
    """A capsule whose numbers are multiples of 1/64, the same on every machine."""
    capsule = Capsule(configure(**changes))
    for i, (name, tensor) in enumerate(sorted(capsule.state_dict().items())):
        if name.endswith("kept"):
            tensor.copy_(torch.tensor([0, 3, 5, 6]))
        elif name.endswith("widths"):
            tensor.copy_(torch.tensor([0, 1, 2, 3, 4, 8])[torch.arange(tensor.numel()) % 6].view_as(tensor))
        else:
            tensor.copy_(((torch.arange(tensor.numel()) * 37 + 11 * i + salt) % 64 - 32).reshape(tensor.shape) / 64)
    return capsule


def equal(one: Capsule, other: Capsule) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fixed_capsule().save_pretrained(tmp_path / "tiny", recipe=RECIPE, metrics=METRICS)
    return tmp_path / "tiny"


# Saving and loading


CODECS: dict[str, tuple[str, CodecConfig]] = {
    "kvcapsule": ("kvcapsule", configure().codec),
    "mlp": ("kvcapsule", replace(configure().codec, key_decoder="mlp")),
    "few bits": ("kvcapsule", replace(configure().codec, latent_bits=3)),
    "identity": ("identity", IdentityConfig(tile=8)),
    "transform": ("transform", TransformConfig(8, True, (8, 16), (3, 4), (16, 8), (4, 2), joint_heads=2, bits=1.5)),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    family, codec = CODECS[name]
    capsule = fixed_capsule(family=family, codec=codec).to(dtype)
    capsule.save_pretrained(tmp_path / "new" / "capsule")
    loaded = Capsule.from_pretrained(tmp_path / "new" / "capsule")
    assert loaded.config == capsule.config
    assert equal(loaded, capsule)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_files_are_exactly_five(saved: Path) -> None:
    assert set(os.listdir(saved)) == FILES == set(hub.FILES)
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
    assert json.loads((tmp_path / "tiny" / "metrics.json").read_text()) == {"train": {"loss": None, "steps": 3, "rates": [1, 2]}}
    assert yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text()) == {"output": "runs/demo"}
    with pytest.raises(TypeError, match=r"metrics\.train\.net is a Linear"):
        fixed_capsule().save_pretrained(tmp_path / "other", metrics={"train": {"net": torch.nn.Linear(1, 1)}})
    assert os.listdir(tmp_path) == ["tiny"]


def test_config_is_read_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert hub.read_config(saved) == configure()
    with pytest.raises(CapsuleError, match=r"tiny is not a capsule directory: it lacks model\.safetensors\."):
        hub.load(saved)


def test_another_geometry_is_refused_with_both(saved: Path) -> None:
    other = replace(GEOMETRY, kv_heads=4, rotary="mrope")
    with pytest.raises(GeometryError) as caught:
        Capsule.from_pretrained(saved).require_geometry(other)
    assert str(GEOMETRY.to_dict()) in str(caught.value) and str(other.to_dict()) in str(caught.value)
    assert "kv_heads: 2 != 4" in str(caught.value)


def test_saving_replaces_a_capsule_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    fixed_capsule(salt=1).save_pretrained(saved)
    assert equal(hub.load(saved), fixed_capsule(salt=1))
    (tmp_path / "empty").mkdir()
    fixed_capsule().save_pretrained(tmp_path / "empty")
    (tmp_path / "link").symlink_to(saved)
    fixed_capsule(salt=2).save_pretrained(tmp_path / "link")
    assert equal(hub.load(saved), fixed_capsule(salt=2)) and (tmp_path / "link").is_symlink()
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
    assert equal(hub.load(saved), fixed_capsule())


# Failures while saving


def full_disk_in_the_second_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.write

    def fail_half_way(path: Path, content: bytes) -> None:
        if path.name == "model.safetensors":
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(files, "write", fail_half_way)


def full_disk_at_the_last_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == len(FILES):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def limit_of_file_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system itself stops the write, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = files.write

    def limited(path: Path, content: bytes) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            write(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(files, "write", limited)


@pytest.mark.parametrize("fail", [full_disk_in_the_second_file, full_disk_at_the_last_sync, limit_of_file_size])
def test_disk_full(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None]) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for target in (saved, tmp_path / "new"):
        with monkeypatch.context() as patch:
            fail(patch)
            with pytest.raises(CapsuleError) as caught:
                fixed_capsule(salt=1).save_pretrained(target, recipe=RECIPE)
        message = str(caught.value)
        assert f"cannot save the capsule to {target}: " in message and "\n" not in message
        needed, free = (
            int(number.replace(",", "")) for number in (message.split(" bytes")[0].split()[-1], message.split(" are free")[0].split()[-1])
        )
        fixed_capsule(salt=1).save_pretrained(tmp_path / "measure", recipe=RECIPE, card_name=target.name)
        assert needed == sum(path.stat().st_size for path in (tmp_path / "measure").iterdir())
        shutil.rmtree(tmp_path / "measure")
        assert 0 <= free <= shutil.disk_usage(tmp_path).total
        assert ("untouched" in message) == target.exists()
    assert os.listdir(tmp_path) == ["tiny"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert equal(hub.load(saved), fixed_capsule())


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_puts_the_old_capsule_back(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    rename, calls = Path.rename, []

    def fail_once(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_once)
        with pytest.raises(CapsuleError, match="untouched"):
            fixed_capsule(salt=1).save_pretrained(saved)
    assert os.listdir(saved.parent) == ["tiny"]
    assert equal(hub.load(saved), fixed_capsule())


def test_an_interrupt_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fixed_capsule(salt=1).save_pretrained(saved)
    assert os.listdir(saved.parent) == ["tiny"]
    assert equal(hub.load(saved), fixed_capsule())


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
        hub.load(saved)
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
        hub.load(saved)


def test_wrong_tensors_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.0.keys.theta"] = tensors["layers.0.keys.theta"][:, :, :-1].contiguous()
    tensors["layers.1.values.extra"] = tensors.pop("layers.1.values.mean")
    tensors["layers.1.keys.kept"] = tensors["layers.1.keys.kept"].float()
    save_file(tensors, path, {"format": "kvcapsule", "format_version": "1"})
    with pytest.raises(CapsuleError) as caught:
        hub.load(saved)
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
        hub.load(saved)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "has format None in its metadata"),
        ({"format": "pt"}, "has format 'pt'"),
        ({"format": "kvcapsule", "format_version": "2"}, "has format_version '2' in its metadata; this version of kvcapsule reads '1'"),
    ],
)
def test_weights_of_another_format(saved: Path, metadata: dict[str, str] | None, expected: str) -> None:
    save_file(load_file(saved / "model.safetensors"), saved / "model.safetensors", metadata)
    with pytest.raises(CapsuleError, match=expected):
        hub.load(saved)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 2}, r"config\.json: capsule format version 2; this version of kvcapsule reads version 1"),
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
        hub.load(saved)


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
    for read in (hub.read_config, hub.load):
        with pytest.raises(CapsuleError, match=expected):
            read(saved)


# Names


def test_names_that_lead_nowhere(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CapsuleError) as caught:
        hub.load("no-such-capsule")
    message = str(caught.value)
    assert "'no-such-capsule'" in message and str(Path.cwd() / "no-such-capsule") in message and "organisation/name" in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(CapsuleError, match=r"empty is not a capsule directory: it lacks config\.json, model\.safetensors"):
        hub.load(tmp_path / "empty")
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent/capsule", Path("absent/capsule")):
        with pytest.raises(CapsuleError, match=r"there is no directory .*absent"):
            hub.read_config(name)
    with pytest.raises(CapsuleError, match="is a file"):
        hub.load(saved / "config.json")
    with pytest.raises(CapsuleError, match="no capsule ''"):
        hub.load("")
    with pytest.raises(CapsuleError, match="only repositories on the Hub have revisions"):
        hub.load(saved, revision="main")


def test_shipped_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all((shipped(name) or tmp_path) / "config.json" for name in shipped_names())
    assert [shipped(name) for name in ("no-such", "", ".", "..", "../checkpoints", "org/name", str(tmp_path))] == [None] * 7
    monkeypatch.setattr("kvcapsule.checkpoints.HERE", tmp_path)
    fixed_capsule().save_pretrained(tmp_path / "tiny-demo")
    assert shipped("tiny-demo") == tmp_path / "tiny-demo" and shipped_names() == ["tiny-demo"]
    assert equal(Capsule.from_pretrained("tiny-demo"), fixed_capsule())
    with pytest.raises(CapsuleError, match=r"\(shipped: tiny-demo\)"):
        Capsule.from_pretrained("tiny-dmo")


# The card


def front_matter(card: str) -> dict[str, Any]:
    values = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(values, dict)
    return values


def test_card(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert front_matter(card) == {
        "base_model": "org/vlm",
        "library_name": "kvcapsule",
        "license": "apache-2.0",
        "tags": ["kv-cache", "compression", "vision-language"],
    }
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "README.md", "exec")
    assert len(snippet.splitlines()) == 3 and 'Capsule.from_pretrained("tiny")' in snippet
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert (
        "| method | settings | accuracy, transcribe | accuracy, count | agreement | KL | visual KV bytes | KV bytes | parameter bytes "
        "| compression | prefill, ratio | tokens/s, ratio | n |"
    ) in table
    assert "| capsule | r=0.5 | 0.9375 | 1 | 0.9688 | 0.0125 | 123,456 | 234,567 | 3,456 | 2.5 | 1.25 | 0.75 | 200 |" in table
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
    hub.update_metrics(folder, {"eval": {"command": "kvcapsule eval --capsule tiny --seed 1", "rows": [layered]}})
    card = (folder / "README.md").read_text()
    assert "| capsule | key_ratios=0.5/0.25 | 0.9375 |" in card and "Printed by `kvcapsule eval --capsule tiny --seed 1`." in card
    assert "Not measured yet" in before and "Not measured" not in card
    assert card.startswith(before.split("## Measured")[0]) and card.endswith(
        "## Recipe" + before.split("## Recipe")[1] + "\nWritten by hand.\n"
    )
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["train"] == {"loss": 0.5} and saved["eval"]["rows"] == [layered]
    hub.update_metrics(folder, {"eval": None})
    assert (folder / "README.md").read_text() == before + "\nWritten by hand.\n"
    assert os.listdir(tmp_path) == ["tiny"] and set(os.listdir(folder)) == FILES


def test_measurements_that_cannot_be_put_in(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        limit_of_file_size(patch)
        with pytest.raises(CapsuleError, match=r"cannot save .*untouched"):
            hub.update_metrics(saved, {"train": {"loss": "x" * 2000}})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before and os.listdir(tmp_path) == ["tiny"]
    for damaged in ("{", "[]"):
        (saved / "metrics.json").write_text(damaged)
        with pytest.raises(CapsuleError, match=r"metrics\.json is damaged"):
            hub.update_metrics(saved, {})
    with pytest.raises(CapsuleError, match="is not a capsule directory"):
        hub.update_metrics(tmp_path, {})


def test_card_without_measurements_says_so(tmp_path: Path) -> None:
    for metrics in (None, {}, {"train": {"loss": 1.0}}, {"eval": {"rows": []}}):
        card = model_card(configure(), None, metrics, "org/tiny")
        assert "Not measured yet: run `kvcapsule eval --capsule org/tiny`." in card
        assert "No recipe was saved" in card
    local = model_card(configure(base_model=str(tmp_path)), None, None)
    assert "base_model" not in front_matter(local) and str(tmp_path) in local


# The format


def test_golden_capsule_of_version_1() -> None:
    """A folder that stays for ever: whoever changes the format adds another for the new version and goes on reading this one."""
    assert set(os.listdir(GOLDEN)) == FILES
    assert hub.read_config(GOLDEN) == configure()
    # Written before the key was known: its absence means its default.
    assert "latent_bits" not in (GOLDEN / "config.json").read_text()
    assert hub.read_config(GOLDEN).codec.latent_bits == 0
    capsule = hub.load(GOLDEN)
    shapes = {"keys.kept": (4,), "keys.theta": (2, 8, 4), "values.basis": (2, 6, 8), "values.mean": (2, 4)}
    expected = {f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    state = capsule.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert {str(t.dtype) for name, t in state.items() if name.endswith("kept")} == {"torch.int64"}
    assert {str(t.dtype) for name, t in state.items() if not name.endswith("kept")} == {"torch.float32"}
    assert state["layers.0.keys.kept"].tolist() == [0, 3, 5, 6]
    assert (state["layers.0.keys.theta"][0, :2] * 64).tolist() == [[-21, 16, -11, 26], [-1, -28, 9, -18]]
    assert (state["layers.1.values.basis"][1, 5] * 64).tolist() == [26, -1, -28, 9, -18, 19, -8, 29]
    assert (state["layers.1.values.mean"] * 64).tolist() == [[-19, 18, -9, 28], [1, -26, 11, -16]]
    # What the numbers mean: keys are read as theta K[kept], values as U^T U (V - mean) + mean.
    tile = torch.arange(1 * 2 * 8 * 4).reshape(1, 2, 8, 4) / 4
    keys, values = capsule.layers[1].keys.encode(tile), capsule.layers[1].values.encode(tile)
    assert torch.equal(keys.keys, tile[:, :, [0, 3, 5, 6]])
    assert (keys.score_map @ keys.keys)[0, 1, 7].tolist() == [-4.171875, -4.2578125, -4.34375, -4.4296875]
    restored = values.value_map @ values.values + values.value_mean[:, None]
    assert restored[0, 0, 0].tolist() == [2.97833251953125, 3.2911376953125, 3.41253662109375, 3.725341796875]


def test_the_format_is_that_of_the_golden_capsule(saved: Path) -> None:
    """If this fails, files written from now on differ from those of version 1: raise FORMAT_VERSION and add a golden capsule.

    Only keys with a default that means what their absence meant may join (checkpoints/FORMAT.md).
    """
    golden = (GOLDEN / "config.json").read_text()
    joined = golden.replace('    "canonical_frame": true,\n', '    "canonical_frame": true,\n    "latent_bits": 0,\n')
    assert joined != golden
    assert (saved / "config.json").read_text() == joined
    with safe_open(saved / "model.safetensors", "pt") as new, safe_open(GOLDEN / "model.safetensors", "pt") as old:
        assert new.metadata() == old.metadata() == {"format": "kvcapsule", "format_version": "1"}
        assert set(new.keys()) == set(old.keys())
        for key in old.keys():  # noqa: SIM118
            one, other = new.get_tensor(key), old.get_tensor(key)
            assert one.dtype == other.dtype and torch.equal(one, other), key
    for name in ("recipe.yaml", "metrics.json"):
        assert (saved / name).read_bytes() == (GOLDEN / name).read_bytes()


def keys_of(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from keys_of(value)


def test_the_format_is_documented() -> None:
    text = FORMAT.read_text()
    capsules = [fixed_capsule(family=family, codec=codec) for family, codec in CODECS.values()]
    names = {name.split(".", 2)[2] for capsule in capsules for name in capsule.state_dict()}
    keys = {key for capsule in capsules for key in keys_of({**capsule.config.to_dict(), "metadata": {}})}
    missing = [word for word in {*FILES, *FAMILIES, *names, *keys, *ROW} if f"`{word}`" not in text]
    assert not missing, f"checkpoints/FORMAT.md does not explain {', '.join(sorted(missing))}."


# The Hub

CLIENT = """
import contextlib, io, json, sys
from kvcapsule import Capsule, CapsuleError, hub
from kvcapsule.cli.push import main

RESULTS = {}

def attempt(name, function, *args, **kwargs):
    try:
        value = function(*args, **kwargs)
    except CapsuleError as error:
        value = {"error": str(error)}
    if isinstance(value, Capsule):
        value = value.state_dict()["layers.0.keys.theta"].flatten().tolist()
    RESULTS[name] = value if isinstance(value, (str, int, list, dict)) else repr(value)

def command(*args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(args))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}
"""
ONLINE = """
first, second = sys.argv[1:]
attempt("missing", hub.load, "org/absent")
attempt("missing config", hub.read_config, "org/absent")
attempt("pushed", hub.push, first, "org/tiny")
attempt("pushed again", hub.push, first, "org/tiny")
attempt("pushed branch", Capsule.from_pretrained(second).push_to_hub, "org/tiny", revision="v2", metrics={"train": {"loss": 2.0}})
attempt("loaded", Capsule.from_pretrained, "org/tiny")
attempt("loaded branch", Capsule.from_pretrained, "org/tiny", revision="v2")
attempt("missing revision", hub.load, "org/tiny", revision="v3")
attempt("missing revision config", hub.read_config, "org/tiny", revision="v3")
attempt("private", hub.push, first, "org/secret", private=True)
attempt("already public", hub.push, second, "org/tiny", private=True)
attempt("config only", hub.read_config, "org/secret")
attempt("model", hub.load, "org/model")
attempt("not a capsule", hub.load, "org/plain")
attempt("not a capsule config", hub.read_config, "org/plain")
attempt("wrong token", hub.push, first, "org/other", token="hf_wrong")
attempt("wrong name", hub.push, first, "tiny")
attempt("wrong directory", hub.push, "org/absent", "org/other")
attempt("command", command, first, "org/command", "--private", "--revision", "v1")
attempt("failed command", command, first + "-absent", "org/command")
"""
AWAY = """
for mode in ("unreachable", "offline"):
    # What the variable HF_HUB_OFFLINE sets when the client is imported.
    hub.constants.HF_HUB_OFFLINE = mode == "offline"
    attempt(f"{mode}: loaded", hub.load, "org/tiny")
    attempt(f"{mode}: loaded branch", hub.load, "org/tiny", revision="v2")
    attempt(f"{mode}: config only", hub.read_config, "org/secret")
    attempt(f"{mode}: config only, load", hub.load, "org/secret")
    attempt(f"{mode}: missing", hub.load, "org/absent")
    attempt(f"{mode}: push", hub.push, sys.argv[1], "org/tiny")
# Only offline: where nothing answers, the client asks for a single file again and again, for 25 seconds.
attempt("missing config", hub.read_config, "org/absent", revision="v2")
"""


def run_client(script: str, arguments: list[str], home: Path, endpoint: str) -> dict[str, Any]:
    """What the script's attempts gave. A process of its own, since huggingface_hub reads its settings when it is imported."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower() and k != "TRANSFORMERS_OFFLINE"
    }
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-c", f"{CLIENT}{script}\nprint(json.dumps(RESULTS))", *arguments]
    done = subprocess.run(command, env={**clean, **settings}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert isinstance(results, dict)
    return results


class Visit:
    """One client process that did everything with one server, and what both saw."""

    def __init__(self, folder: Path, server: HubServer) -> None:
        self.server, self.home, self.first, self.second = server, folder / "home", folder / "first", folder / "second"
        fixed_capsule().save_pretrained(self.first, recipe=RECIPE, metrics=METRICS)
        fixed_capsule(salt=1).save_pretrained(self.second)
        server.add("org/plain", {"README.md": b"nothing"})
        server.add("org/model", {"config.json": b'{"model_type": "llava"}', "model.safetensors": b"", "extra.bin": b"x"})
        self.results = run_client(ONLINE, [str(self.first), str(self.second)], self.home, server.url)

    def error(self, name: str) -> str:
        return str(self.results[name]["error"])


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    with HubServer() as server:
        yield Visit(tmp_path_factory.mktemp("hub"), server)


def theta(salt: int) -> list[float]:
    values: list[float] = fixed_capsule(salt).state_dict()["layers.0.keys.theta"].flatten().tolist()
    return values


def test_pushed_capsules_come_back(visit: Visit) -> None:
    assert visit.results["pushed"] == visit.results["pushed again"] == f"{visit.server.url}/org/tiny"
    assert visit.results["pushed branch"] == f"{visit.server.url}/org/tiny/tree/v2"
    assert visit.results["loaded"] == theta(0)
    assert visit.results["loaded branch"] == theta(1) != theta(0)


def test_what_is_pushed_is_the_directory(visit: Visit) -> None:
    files = visit.server.files("org/tiny")
    assert set(files) == FILES | {".gitattributes"}
    for name in FILES - {"README.md"}:
        assert files[name].content == (visit.first / name).read_bytes()
    assert files["model.safetensors"].lfs and not files["config.json"].lfs
    local = (visit.first / "README.md").read_text()
    assert (
        files["README.md"].content.decode()
        == local.replace('Capsule.from_pretrained("first")', 'Capsule.from_pretrained("org/tiny")')
        != local
    )
    branch = visit.server.files("org/tiny", "v2")
    assert json.loads(branch["metrics.json"].content) == {"train": {"loss": 2.0}}
    # The second push of the same files made no commit: the two branches' beginnings and one commit on each are all.
    assert len(visit.server.repositories["org/tiny"].commits) == 3


def test_config_alone_is_downloaded_alone(visit: Visit) -> None:
    assert visit.results["config only"] == repr(configure())
    got = [request for request in visit.server.requests if request.startswith("GET /org/secret/resolve")]
    assert [request.rpartition("/")[2] for request in got] == ["config.json"]


def test_a_snapshot_is_the_capsule_and_no_more(visit: Visit) -> None:
    assert visit.error("model") == visit.error("model").strip() and "the model_type 'llava' of a model" in visit.error("model")
    assert not [request for request in visit.server.requests if request.endswith("extra.bin")]


def test_private_stays_private(visit: Visit) -> None:
    assert visit.results["private"] == f"{visit.server.url}/org/secret"
    assert visit.server.repositories["org/secret"].private and not visit.server.repositories["org/tiny"].private
    assert "nothing was pushed: org/tiny exists already and is public" in visit.error("already public")
    assert visit.server.files("org/tiny")["model.safetensors"].content == (visit.first / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing", ["no capsule 'org/absent'", "no such directory", "no such repository on the Hub"]),
        ("missing config", ["no capsule 'org/absent'", "no such directory", "no such repository on the Hub"]),
        ("missing revision", ["the repository org/tiny on the Hub has no revision 'v3'"]),
        ("missing revision config", ["the repository org/tiny on the Hub has no revision 'v3'"]),
        ("not a capsule", ["org/plain", "not a capsule", "config.json, model.safetensors missing"]),
        ("not a capsule config", ["org/plain", "not a capsule", "config.json"]),
        ("wrong token", ["cannot push to org/other", "does not let you write there (HTTP 401)", "hf auth login"]),
        ("wrong name", ["'tiny' is no name of a repository", "organisation/name"]),
        ("wrong directory", ["there is no directory 'org/absent' to push"]),
    ],
)
def test_errors_of_the_hub(visit: Visit, name: str, expected: list[str]) -> None:
    message = visit.error(name)
    assert not [part for part in expected if part not in message], message
    assert "\n" not in message


def test_push_command(visit: Visit) -> None:
    assert visit.results["command"] == {"code": 0, "out": f"{visit.server.url}/org/command/tree/v1\n", "err": ""}
    assert visit.server.repositories["org/command"].private
    assert set(visit.server.files("org/command", "v1")) == FILES | {".gitattributes"}
    assert set(visit.server.files("org/command")) == {".gitattributes"}
    failed = visit.results["failed command"]
    assert failed["code"] == 2 and failed["out"] == ""
    assert failed["err"].startswith("kvcapsule push: no capsule ") and failed["err"].count("\n") == 1


def test_damaged_capsules_are_not_pushed(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CapsuleError, match="cannot be read"):
        hub.push(saved, "org/tiny")
    (saved / "recipe.yaml").unlink()
    with pytest.raises(CapsuleError, match=r"lacks recipe\.yaml"):
        hub.push(saved, "org/tiny")
    with pytest.raises(CapsuleError, match="a directory has its own"):
        hub.push(saved, "org/tiny", metrics=METRICS)


def test_push_command_reads_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["a"], ["a", "b", "--public"]):
        with pytest.raises(SystemExit, match="2"):
            push_command.main(arguments)
        error = capsys.readouterr().err
        assert error.startswith("kvcapsule push: ") and error.count("\n") == 1


def test_without_the_hub(visit: Visit, tmp_path: Path) -> None:
    """What is in the cache loads; what is not says why, where nothing answers and in offline mode."""
    shutil.copytree(visit.home, tmp_path / "home", symlinks=True)
    with HubServer() as gone:
        nowhere = gone.url
    results = run_client(AWAY, [str(visit.first)], tmp_path / "home", nowhere)
    for mode, reason in (("unreachable", f"the Hub ({nowhere}) gave no usable answer"), ("offline", "offline mode is on")):
        assert results[f"{mode}: loaded"] == theta(0) and results[f"{mode}: loaded branch"] == theta(1)
        assert results[f"{mode}: config only"] == repr(configure())
        assert "model.safetensors" in results[f"{mode}: config only, load"]["error"]
        missing = results[f"{mode}: missing"]["error"]
        assert "no capsule 'org/absent': there is no such directory here, it is not wholly in this machine's cache" in missing
        assert reason in missing
        assert "cannot push to org/tiny" in results[f"{mode}: push"]["error"]
    assert "no capsule 'org/absent' at revision 'v2': " in results["missing config"]["error"]
