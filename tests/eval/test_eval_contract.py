"""The JSON object of `kvcapsule eval`: what docs/eval-json.md promises to those who read it."""

import json
import platform
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.cli.results import command_line
from kvcapsule.codec.kvcapsule import KVCapsuleConfig
from kvcapsule.data.source import SourceConfig
from kvcapsule.eval import main as command
from kvcapsule.eval import run
from kvcapsule.vlm.geometry import KVGeometry

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "eval-json.md"
NUMBER = (int, float)
TOP = {
    "model": str,
    "data": dict,
    "versions": dict,
    "seed": int,
    "machine": dict,
    "rows": list,
    "baseline": str,
    "command": str,
    "revision": (str, type(None)),
    "dtype": str,
    "batch": int,
    "max_new_tokens": int,
    "protocol": str,
    "metric": str,
    "answer_tokens": dict,
    "seen": dict,
}
ROW = {
    "method": str,
    "family": str,
    "settings": dict,
    "accuracy": dict,
    "agreement": NUMBER,
    "kl": NUMBER,
    "first_token_kl": NUMBER,
    "reads_question": bool,
    "visual_kv_bytes": int,
    "kv_bytes": int,
    "host_kv_bytes": int,
    "parameter_bytes": int,
    "compression": NUMBER,
    "compression16": NUMBER,
    "prefill_ratio": NUMBER,
    "tokens_per_s_ratio": NUMBER,
    "n": int,
}
MACHINE = {
    "cpu": str,
    "cores": int,
    "threads": int,
    "memory_gib": (*NUMBER, type(None)),
    "accelerator": (str, type(None)),
}
DATA = {"source", "split", "size", "seed", "image", "prompt", "answer", "task"}
DATA |= {"subset", "streaming", "format", "skip_broken"}
VERSIONS = {"python", "kvcapsule", "torch", "transformers", "datasets"}


@pytest.fixture(scope="module")
def result(tmp_path_factory, model, processor) -> dict[str, Any]:
    """Of a run with timing, as it comes back from JSON."""
    folder = tmp_path_factory.mktemp("contract")
    model.save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    codec = KVCapsuleConfig(tile=196, key_ratios=(0.3,) * 4, value_ratios=(0.3,) * 4)
    capsule = Capsule(CapsuleConfig("kvcapsule", codec, KVGeometry.from_config(model.config), "vlm"))
    for tensor in capsule.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.1)
    capsule.save_pretrained(folder / "capsule")
    config = command.EvalConfig(
        model=str(folder / "vlm"),
        capsule=[str(folder / "capsule")],
        data=SourceConfig(split="test", size=4),
        batch=4,
        max_new_tokens=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "time_entries", partial(run.time_entries, rounds=1, steps=2))
        found = run.run(config, Console(quiet=True), command_line(command.PROG, ["--model", str(folder / "vlm")]))
    return json.loads(json.dumps(found, allow_nan=False))


def _check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for key, kind in expected.items():
        assert isinstance(found[key], kind) and isinstance(found[key], bool) == (kind is bool), key


def test_keys_and_types(result) -> None:
    _check(result, TOP)
    _check(result["machine"], MACHINE)
    assert set(result["data"]) == DATA
    assert set(result["versions"]) == VERSIONS and all(isinstance(v, str) for v in result["versions"].values())
    for row in result["rows"]:
        _check(row, ROW)


def test_rows(result) -> None:
    assert [row["method"] for row in result["rows"]] == [
        "full",
        "kvcapsule",
        "post-vision-attention",
        "evenly-spaced",
        "int4",
    ]
    for row in result["rows"]:
        assert set(row["accuracy"]) == {"transcribe", "line", "lookup", "count"} == set(result["answer_tokens"])
        assert all(0 <= score <= 1 for score in row["accuracy"].values())
        assert 0 <= row["agreement"] <= 1 and row["kl"] >= 0
        assert row["kv_bytes"] > row["visual_kv_bytes"] > 0
        assert row["n"] == 4


def test_full_row_is_the_yardstick(result) -> None:
    full, *others = result["rows"]
    assert (full["compression"], full["agreement"], full["kl"]) == (1.0, 1.0, 0)
    assert (full["prefill_ratio"], full["tokens_per_s_ratio"], full["parameter_bytes"]) == (1.0, 1.0, 0)
    for row in others:
        assert row["compression"] == pytest.approx(full["visual_kv_bytes"] / row["visual_kv_bytes"], rel=1e-3)
        assert row["compression"] > 1 and row["kl"] > 0
    assert others[0]["parameter_bytes"] > 0


def test_families(result) -> None:
    assert [row["family"] for row in result["rows"]] == [
        "full",
        "kvcapsule",
        "token-pruning",
        "token-pruning",
        "quantisation",
    ]


def test_compression_at_16_bits(result, model, processor, tmp_path) -> None:
    """In float32 half of what the same precision on both sides gives; in bfloat16 the same."""
    assert result["dtype"] == "float32"
    for row in result["rows"]:
        assert row["compression16"] == pytest.approx(row["compression"] / 2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    data = SourceConfig(split="test", size=1)
    config = command.EvalConfig(
        model=str(tmp_path), methods=["int4"], data=data, max_new_tokens=2, timing=False, dtype="bfloat16"
    )
    narrow = run.run(config, Console(quiet=True), "")
    assert narrow["dtype"] == "bfloat16"
    for row in narrow["rows"]:
        assert row["compression16"] == row["compression"]


def test_times_are_null_where_nothing_was_timed(model, processor, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = command.EvalConfig(
        model=str(tmp_path), methods=["int4"], data=SourceConfig(split="test", size=1), max_new_tokens=2, timing=False
    )
    for row in run.run(config, Console(quiet=True), "")["rows"]:
        assert row["prefill_ratio"] is None and row["tokens_per_s_ratio"] is None


def test_neither_host_nor_place(result) -> None:
    text = json.dumps(result)
    assert platform.node() not in result["machine"].values()
    assert str(Path.home()) + "/" not in text and "/vlm" not in text and "/capsule" not in text
    assert (result["model"], result["command"]) == ("vlm", "kvcapsule eval --model vlm")
    assert result["rows"][1]["settings"]["capsule"] == "capsule"


def test_the_baseline_is_named(result) -> None:
    assert "DynamicCache" in result["baseline"] and "sdpa" in result["baseline"]


def test_the_document_names_every_key_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE))
    assert documented == {*TOP, *ROW, *MACHINE, *DATA, *VERSIONS}
