"""Folders that were made to do harm: each is refused by one line, at once, without taking memory."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.capsule_files import CODECS, GEOMETRY, METRICS, configure, fixed_capsule, loadable

from kvcapsule import Capsule, CapsuleConfig, CapsuleError, KVGeometry
from kvcapsule.capsule import hub
from kvcapsule.capsule.write import update_metrics
from kvcapsule.codec.compact import CompactConfig
from kvcapsule.codec.transform import TransformConfig

METADATA = {"format": "kvcapsule", "format_version": "1"}
WEIGHTS = "model.safetensors"


def refused(read: Callable[[], Any]) -> str:
    """The one line by which it is refused, within two seconds."""
    begin = time.monotonic()
    with pytest.raises(CapsuleError) as caught:
        read()
    assert time.monotonic() - begin < 2
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


def loading(folder: Path) -> str:
    return refused(lambda: Capsule.from_pretrained(folder))


@contextmanager
def memory(most: int) -> Iterator[None]:
    """Fails if the process takes more than `most` bytes more at any time within."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not tell the peak of memory")

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < most


def change(folder: Path, path: str, value: Any) -> None:
    """Set a value of config.json; path: its keys with dots between them."""
    values = json.loads((folder / "config.json").read_text())
    *keys, last = path.split(".")
    inner = values
    for key in keys:
        inner = inner[key]
    inner[last] = value
    (folder / "config.json").write_text(json.dumps(values))


def change_header(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    edit(table)
    head = json.dumps(table).encode()
    (folder / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])


def change_tensor(folder: Path, name: str, edit: Callable[[torch.Tensor], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors[name])
    save_file(tensors, folder / WEIGHTS, METADATA)


# Files


@pytest.mark.parametrize("depth", [33, 500, 1000, 100_000])
@pytest.mark.parametrize("place", ["config", "header", "metrics"])
def test_deep_json(saved: Path, depth: int, place: str) -> None:
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    if place == "config":
        (saved / "config.json").write_bytes(deep)
        assert "nested more than 32 deep" in loading(saved) == refused(lambda: hub.read_config(saved))
    elif place == "header":
        (saved / WEIGHTS).write_bytes(len(deep).to_bytes(8, "little") + deep)
        assert "nested more than 32 deep" in loading(saved)
    else:
        (saved / "metrics.json").write_bytes(deep)
        assert "nested more than 32 deep" in refused(lambda: update_metrics(saved, METRICS))


@pytest.mark.parametrize("size", [2**21, 8 * 2**30, 64 * 2**30])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_sparse_files(saved: Path, name: str, size: int) -> None:
    os.truncate(saved / name, size)
    with memory(2**26):
        assert f"{size:,} bytes" in loading(saved)


@pytest.mark.parametrize("name", ["metrics.json", "README.md"])
def test_sparse_files_beside_the_capsule(saved: Path, name: str) -> None:
    os.truncate(saved / name, 8 * 2**30)
    with memory(2**26):
        Capsule.from_pretrained(saved)
        assert "8,589,934,592 bytes" in refused(lambda: update_metrics(saved, METRICS))


def test_a_file_without_end(saved: Path) -> None:
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    assert "lacks config.json" in loading(saved)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no offsets": (lambda t: t["layers.0.keys.kept"].update(data_offsets=[]), "does not lie where its shape says"),
    "overlapping": (
        lambda t: t["layers.0.keys.theta"].update(data_offsets=t["layers.1.keys.theta"]["data_offsets"]),
        "does not lie where its shape says",
    ),
    "no dtype": (lambda t: t["layers.0.keys.kept"].pop("dtype"), "no sound safetensors file"),
    "huge": (lambda t: t["layers.0.keys.kept"].update(shape=[2**40, 2**40]), "does not lie where"),
    "negative": (lambda t: t["layers.0.keys.kept"].update(shape=[-4]), "has no form that kvcapsule knows"),
    "entry": (lambda t: t.update(x=[1, 2]), "no sound safetensors file"),
    "metadata": (lambda t: t.update(__metadata__=[]), "its metadata is no object"),
    "long name": (lambda t: t.update({"n" * 5000: t.pop("layers.0.keys.kept")}), "is unexpected"),
    "NaN": (lambda t: t["layers.0.keys.kept"].update(shape=[float("nan")]), "is no finite number"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(saved: Path, name: str) -> None:
    edit, message = HEADERS[name]
    change_header(saved, edit)
    assert message in loading(saved)


def test_a_name_twice_in_the_header(saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    changed = content.replace(b'"layers.0.keys.kept"', b'"layers.1.keys.kept"')
    assert len(changed) == len(content) and changed != content
    (saved / WEIGHTS).write_bytes(changed)
    assert "a key stands in it twice" in loading(saved)


@pytest.mark.parametrize("name", ["~nobodyhere/x", "x" * 5000, "a\0b", "\udcff/x", "x/" * 3000, "org/" + "n" * 300])
def test_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(lambda: Capsule.from_pretrained(name))
    refused(lambda: hub.read_config(name))


@pytest.mark.parametrize("name", ["~nobodyhere/x", "a\0b", "x" * 5000, "x/" * 3000])
def test_names_to_save_to(name: str) -> None:
    refused(lambda: fixed_capsule().save_pretrained(name))


# Config


@pytest.mark.parametrize("path", ["geometry.layers", "geometry.head_dim", "geometry.kv_heads", "codec.tile"])
@pytest.mark.parametrize("value", [10**4, 10**6, 10**9, 10**30])
def test_sizes_are_compared_before_memory_is_taken(saved: Path, path: str, value: int) -> None:
    change(saved, path, value)
    with memory(2**26):
        message = loading(saved)
    assert "config.json" in message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", True, "capsule format version True"),
        ("format_version", 1.0, "capsule format version 1.0"),
        ("base_model", 3, "base_model is 3; it must be text"),
        ("base_revision", [], "base_revision is []; it must be text or null"),
        ("metadata", [], "metadata is no object"),
        ("codec", [], "codec is no object"),
        ("codec", {}, "lacks tile"),
        ("geometry", "x", "geometry is no object"),
        ("geometry.model_type", None, "model_type is None; it must be text"),
        ("geometry.layers", True, "layers is True; it must be a whole number"),
        ("geometry.layers", 0, "geometry.layers 0 is outside 1 to 4,096"),
        ("geometry.head_dim", -4, "geometry.head_dim -4 is outside"),
        ("geometry.query_heads", 3, "query_heads 3 is no multiple of kv_heads 2"),
        ("geometry.rotary", "2d", "geometry.rotary '2d' is unknown; it is one of none, 1d,"),
        ("geometry.colour", 1, "unknown or missing: colour"),
        ("codec.tile", 8.0, "tile is 8.0; it must be a whole number"),
        ("codec.tile", "8", "tile is '8'; it must be a whole number"),
        ("codec.canonical_frame", {"a": 1}, "canonical_frame is {'a': 1}; it must be true or false"),
        ("codec.canonical_frame", 1, "canonical_frame is 1; it must be true or false"),
        ("codec.align", None, "align is None; it must be a whole number"),
        ("codec.align", 0, "align 0 must be at least 1"),
        ("codec.latent_bits", 7, "7 bits cannot be packed"),
        ("codec.key_ratios", 0.5, "key_ratios is 0.5; it must be a list, each item a finite number"),
        ("codec.key_ratios", [0.5, True], "key_ratios is (0.5, True); it must be a list"),
        ("codec.key_ratios", [0.5, float("nan")], "is no finite number"),
        ("codec.key_ratios", [0.5, 1.5], "1.5 is outside (0, 1]"),
        ("codec.key_ratios", [0.5] * 1000, "1000 key retention ratios for 2 layers"),
        ("codec.key_decoder", [], "key_decoder is (); it must be text"),
        ("codec.hidden", 0, "hidden 0: at least 1"),
        ("base_model", "\ud800", "surrogates not allowed"),
    ],
)
def test_config_values_are_refused_by_name(saved: Path, path: str, value: Any, message: str) -> None:
    change(saved, path, value)
    assert message in loading(saved)
    # Whether there is a number for each layer shows as the codecs are built.
    if "layers" not in message:
        assert message in refused(lambda: hub.read_config(saved))


def test_infinite_numbers_in_other_spellings(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    for number in ("1e999", "-Infinity", "9" * 5000):
        (saved / "config.json").write_text(text.replace('"tile": 8', f'"tile": {number}'))
        assert "config.json is not JSON" in loading(saved)


# Tensors


def capsule_in(folder: Path, name: str) -> Path:
    compact = CompactConfig(8, ratios=(0.5, 0.5), bank=4, selector="learned", hidden=3)
    family, codec = {**CODECS, "compact": ("compact", compact)}[name]
    capsule = loadable(fixed_capsule(family=family, codec=codec))
    for key, tensor in capsule.state_dict().items():
        if key.endswith("spread"):
            tensor.fill_(0.5)
    capsule.save_pretrained(folder / name)
    Capsule.from_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("family", ["kvcapsule", "mlp"])
@pytest.mark.parametrize("kept", [[0, 3, 5, 8], [-1, 3, 5, 6], [0, 3, 3, 6], [5, 3, 0, 6], [0, 3, 5, 2**62]])
def test_kept_tokens_are_places_in_the_tile(tmp_path: Path, family: str, kept: list[int]) -> None:
    folder = capsule_in(tmp_path, family)
    change_tensor(folder, "layers.1.keys.kept", lambda tensor: tensor.copy_(torch.tensor(kept)))
    assert "layers.1.keys.kept must be ascending places in a tile of 8 tokens" in loading(folder)


@pytest.mark.parametrize("width", [5, 7, 9, 255])
def test_widths_are_those_that_can_be_packed(tmp_path: Path, width: int) -> None:
    folder = capsule_in(tmp_path, "transform")
    name = "layers.0.values.transform.widths"
    change_tensor(folder, name, lambda tensor: tensor.flatten()[-1:].fill_(width))
    assert f"{name} has cells of {width} bits" in loading(folder)


@pytest.mark.parametrize(
    ("family", "name"), [("transform", "layers.1.keys.transform.step"), ("compact", "layers.0.selector.spread")]
)
@pytest.mark.parametrize("number", [0.0, -1.0])
def test_what_is_divided_by_is_above_zero(tmp_path: Path, family: str, name: str, number: float) -> None:
    folder = capsule_in(tmp_path, family)
    change_tensor(folder, name, lambda tensor: tensor.flatten()[-1:].fill_(number))
    assert f"{name} must be above 0" in loading(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_are_none(saved: Path, number: float, dtype: torch.dtype) -> None:
    capsule = fixed_capsule().to(dtype)
    capsule.save_pretrained(saved)
    name = "layers.1.values.basis"
    change_tensor(saved, name, lambda tensor: tensor.flatten()[-1:].fill_(number))
    assert f"{name} holds NaN, infinite numbers" in loading(saved)
    capsule.state_dict()[name].flatten()[:1].fill_(number)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert "training diverged" in refused(lambda: capsule.save_pretrained(saved))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


# What is promised of sound ones


def test_equal_capsules_are_equal_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        loadable(fixed_capsule()).save_pretrained(tmp_path / folder, card_name="x")
    state = fixed_capsule().state_dict()
    shuffled = Capsule(configure())
    shuffled.load_state_dict(dict(reversed(state.items())))
    shuffled.save_pretrained(tmp_path / "c", card_name="x")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1] == files[2]
    loaded = Capsule.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "d", card_name="x")
    assert (tmp_path / "d" / WEIGHTS).read_bytes() == files[0][WEIGHTS]


@pytest.mark.parametrize("name", CODECS)
def test_weights_are_safetensors(tmp_path: Path, name: str) -> None:
    """Its own reader, which knows nothing of kvcapsule, reads the same numbers."""
    family, codec = CODECS[name]
    capsule = loadable(fixed_capsule(family=family, codec=codec))
    capsule.save_pretrained(tmp_path / "x")
    tensors, state = load_file(tmp_path / "x" / WEIGHTS), capsule.state_dict()
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[key], state[key]) for key in tensors)


def test_loading_takes_little_more_memory_than_the_file(tmp_path: Path) -> None:
    geometry = KVGeometry("llava", 4, 8, 8, 128, "1d")
    sizes = (512,) * 4
    codec = TransformConfig(1024, key_rows=sizes, key_channels=sizes, value_rows=sizes, value_channels=sizes)
    codec = replace(codec, joint_heads=8)
    capsule = Capsule(CapsuleConfig("transform", codec, geometry, "x"))
    capsule.save_pretrained(tmp_path / "x")
    del capsule
    size = (tmp_path / "x" / WEIGHTS).stat().st_size
    assert size > 60 * 2**20
    with memory(int(1.2 * size)):
        loaded = Capsule.from_pretrained(tmp_path / "x")
    assert loaded.config.geometry == replace(GEOMETRY, layers=4, query_heads=8, kv_heads=8, head_dim=128)
