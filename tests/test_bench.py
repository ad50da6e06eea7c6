"""`kvcapsule bench`: its options, the object that it writes (docs/bench.md), and how it ends."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest

from kvcapsule.eval.bench import main as command
from kvcapsule.eval.bench.config import LEVELS, QUICK, BenchConfig

NUMBER = (int, float)
TOP = {
    "ceilings": dict,
    "rows": list,
    "skipped": list,
    "versions": dict,
    "seed": int,
    "machine": dict,
    "device": str,
    "dtype": str,
    "kernels": str,
    "quick": bool,
    "command": str,
}
CEILINGS = {
    "read_gb_s": NUMBER,
    "copy_gb_s": NUMBER,
    "matmul_gflop_s": NUMBER,
    "dtype": str,
    "threads": int,
    "last_level_cache_bytes": int,
}
OPERATOR = {
    "level": str,
    "geometry": str,
    "batch": int,
    "visual_tokens": int,
    "text_tokens": int,
    "method": str,
    "baseline": str,
    "ratio": NUMBER,
    "bytes": int,
    "formula_bytes": int,
    "touched_bytes": int,
    "traffic_bytes": int,
    "bytes_ratio": NUMBER,
    "seconds": NUMBER,
    "iqr_seconds": NUMBER,
    "rounds": int,
    "copies": int,
    "bandwidth_fraction": NUMBER,
    "error": NUMBER,
    "failed": type(None),
}
SKIPPED = {"level", "geometry", "batch", "visual_tokens", "method", "reason"}


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The object of a quick run of a grid with shapes that are alike and a batch that does not fit."""
    file = tmp_path_factory.mktemp("bench") / "operator.json"
    grid = ["--geometry", "qwen2.5-vl-7b,internvl3-8b", "--batch", "1", "--batch", "4096", "--memory-gib", "2"]
    assert command.main(["--quick", "--level", "operator", *grid, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for key, kind in expected.items():
        assert isinstance(found[key], kind) and (kind is bool or not isinstance(found[key], bool)), key


def test_keys_and_types(operator: dict[str, Any]) -> None:
    check(operator, TOP)
    check(operator["ceilings"], CEILINGS)
    for row in operator["rows"]:
        check(row, OPERATOR)
    assert operator["quick"] is True and operator["kernels"] == "reference" and operator["dtype"] == "float32"


def test_operator_rows(operator: dict[str, Any]) -> None:
    names = [row["method"] for row in operator["rows"]]
    assert names[-3:] == QUICK["methods"] and {"in-place-sdpa", "dynamic-cat", "static-repeat"} < set(names)
    for row in operator["rows"]:
        assert (row["level"], row["geometry"], row["batch"], row["visual_tokens"]) == ("operator", "qwen2.5-vl-7b", 1, 576)
        assert row["formula_bytes"] == pytest.approx(row["bytes"], rel=0.02) == pytest.approx(row["touched_bytes"], rel=0.02)
        assert row["baseline"] in names


def test_what_was_left_out_is_there_with_its_reason(operator: dict[str, Any]) -> None:
    assert all(set(left) == SKIPPED for left in operator["skipped"])
    alike, large = operator["skipped"]
    assert alike["geometry"] == "internvl3-8b" and "like one of qwen2.5-vl-7b" in alike["reason"]
    assert large["batch"] == 4096 and "--memory-gib allows 2.0" in large["reason"]


def test_neither_host_nor_place(operator: dict[str, Any]) -> None:
    text = json.dumps(operator)
    assert platform.node() not in operator["machine"].values()
    assert str(Path.home()) + "/" not in text and "/bench" not in text
    assert operator["command"].endswith("--json operator.json")


def test_a_quick_run_is_a_default_that_options_override() -> None:
    config = command.parse(["--quick", "--batch", "2,4", "--visual-tokens", "64", "--visual-tokens", "128"])
    assert (config.batch, config.visual_tokens, config.methods) == ([2, 4], [64, 128], QUICK["methods"])
    whole = command.parse([])
    assert whole == BenchConfig() and whole.batch == [1, 4, 16, 64] and whole.level == list(LEVELS)
    assert command.parse(["--quick", "--level", "step"]).quick and not command.parse(["--quick", "false"]).quick


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "kernel"], "--level kernel: there is operator, encode, step"),
        (["--geometry", "llava"], "--geometry llava: there is llava-1.5-7b"),
        (["--methods", "kept"], "--methods kept: there is full-segments, int8"),
        (["--batch", "0"], "--batch [0]: at least one number"),
        (["--rounds", "0"], "--rounds 0: more than 0"),
        (["--device", "mps"], "--device mps: only cpu and cuda"),
        (["--dtype", "int8"], "--dtype int8: choose auto"),
        (["--plot", "x.bmp"], "ends in .png"),
        (["--plot", "x.png", "--level", "step"], "--plot draws what --level serving measures"),
        (["--bathc", "1"], "bathc"),
    ],
)
def test_what_cannot_be_used_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("kvcapsule bench: ") and message in line and not out


def test_without_a_gpu_cuda_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--quick", "--device", "cuda"]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in BenchConfig.__dataclass_fields__:
        assert re.search(rf"--{name}\b", text), name
