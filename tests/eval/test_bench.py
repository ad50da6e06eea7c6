"""`kvcapsule bench`: its options, the object that it writes (docs/bench.md), and how it ends."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcapsule.eval.bench import bench_page, ceilings, encode, interleaved_timing, level_tables
from kvcapsule.eval.bench import main as command
from kvcapsule.eval.bench.bench_config import LEVELS, QUICK, BenchConfig
from kvcapsule.eval.bench.layer_data import Cell
from kvcapsule.eval.bench.level_tables import COLUMNS
from kvcapsule.eval.bench.shapes import Shape

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "bench.md"
NUMBER = (int, float)
PLACE = (torch.float32, torch.device("cpu"))
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
EVERY = {
    "level",
    "geometry",
    "batch",
    "visual_tokens",
    "method",
    "baseline",
    "ratio",
    "seconds",
    "iqr_seconds",
    "rounds",
    "failed",
}
ROWS = {
    "operator": set(OPERATOR),
    "encode": EVERY | {"text_tokens", "share"},
    "step": EVERY | {"shape", "bytes", "bytes_ratio", "weight_bytes", "bound", "tokens_s", "bandwidth_fraction"},
    "end-to-end": EVERY
    | {
        "shape",
        "bytes",
        "bytes_ratio",
        "weight_bytes",
        "tokens_s",
        "new_tokens",
        "ttft_seconds",
        "ttft_overhead",
        "whole_ratio",
        "peak_bytes",
    },
    "serving": EVERY | {"shape", "bytes", "tokens_s", "budget_mib", "batch_ratio"},
}
SKIPPED = {"level", "geometry", "batch", "visual_tokens", "method", "reason"}


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The object of a quick run of a grid with shapes that are alike and a batch that does not fit, on a CPU with a
    last-level cache of 32 MB: the copies that are read in turn take several times as much."""
    file = tmp_path_factory.mktemp("bench") / "operator.json"
    grid = ["--geometry", "qwen2.5-vl-7b,internvl3-8b", "--batch", "1", "--batch", "4096", "--memory-gib", "2"]
    with pytest.MonkeyPatch.context() as patch:
        for module in (ceilings, interleaved_timing):
            patch.setattr(module, "last_level_cache", lambda device: 32 * 10**6)
        assert command.main(["--quick", "--level", "operator", *grid, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a quick run above operator level has written to."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "b.json"), "--plot", str(folder / "b.png"), "--report", str(folder / "b.md")]
    assert command.main(["--quick", "--level", "step,end-to-end", "--level", "serving", *files]) == 0
    return folder


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for key, kind in expected.items():
        assert isinstance(found[key], kind) and (kind is bool or not isinstance(found[key], bool)), key


def test_keys_and_types(operator: dict[str, Any]) -> None:
    check(operator, TOP)
    check(operator["ceilings"], CEILINGS)
    for row in operator["rows"]:
        check(row, OPERATOR)
    assert operator["quick"] is True and operator["kernels"] == "cpu" and operator["dtype"] == "float32"


def test_operator_rows(operator: dict[str, Any]) -> None:
    names = [row["method"] for row in operator["rows"]]
    assert names[-3:] == QUICK["methods"] and {"in-place-sdpa", "dynamic-cat", "static-repeat"} < set(names)
    for row in operator["rows"]:
        assert (row["level"], row["geometry"], row["batch"], row["visual_tokens"]) == (
            "operator",
            "qwen2.5-vl-7b",
            1,
            576,
        )
        assert (
            row["formula_bytes"]
            == pytest.approx(row["bytes"], rel=0.02)
            == pytest.approx(row["touched_bytes"], rel=0.02)
        )
        assert row["baseline"] in names


def test_what_was_left_out_is_there_with_its_reason(operator: dict[str, Any]) -> None:
    assert all(set(left) == SKIPPED for left in operator["skipped"])
    alike, large = operator["skipped"]
    assert alike["geometry"] == "internvl3-8b" and "like one of qwen2.5-vl-7b" in alike["reason"]
    assert large["batch"] == 4096 and "--memory-gib allows 2.0" in large["reason"]


def test_rows_of_every_level(operator: dict[str, Any], models: Path) -> None:
    found = json.loads((models / "b.json").read_text())
    check(found, TOP)
    of_a_layer = encode.measure(Cell(Shape("tiny", 1, 2, 1, 16, 16, 16, 9), 1, 32, 4, 16, *PLACE), ["int4"], 3, 1.0)
    for level, keys in ROWS.items():
        rows = [row for row in (*operator["rows"], *of_a_layer, *found["rows"]) if row["level"] == level]
        assert rows and all(set(row) == keys for row in rows), level
        assert all(row["failed"] is None and row["ratio"] > 0 and row["seconds"] > 0 for row in rows)
    assert set(ROWS) == set(LEVELS) == set(COLUMNS)
    assert all(set(COLUMNS[level]) <= keys for level, keys in ROWS.items())


def test_the_document_names_every_key_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE))
    assert documented == {*TOP, *CEILINGS, *(key for keys in ROWS.values() for key in keys)} | set(LEVELS) - {
        "end-to-end"
    }


def test_levels_of_some_keys_are_documented() -> None:
    """The column `levels` says in which rows a key is."""
    for key, levels in re.findall(
        r"^\| `(\w+)` \| ([^|`]+) \| \w+", DOCUMENT.read_text().split("Of some:")[1], flags=re.MULTILINE
    ):
        named = set(LEVELS) - {"encode"} if levels == "all but encode" else set(levels.split(", "))
        assert named == {level for level, keys in ROWS.items() if key in keys}, key


def test_the_page_and_the_picture_show_what_was_measured(models: Path) -> None:
    text, found = (models / "b.md").read_text(), json.loads((models / "b.json").read_text())
    for level in ("step", "end-to-end", "serving"):
        assert f"<!-- table: bench-cpu {level} -->" in text
    for row in found["rows"]:
        if row["level"] == "serving":
            assert f"| {row['batch']:,} | {row['batch_ratio']:.1f}x | {row['tokens_s']:,.1f} |" in text
    assert "![sequences that fit and tokens a second](b.png)" in text and "([JSON](b.json))" in text
    assert (models / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_grid_as_a_table(operator: dict[str, Any], tmp_path: Path) -> None:
    """One line a cell, written anew by each run; the rest of the page stays."""
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- table: bench-cpu operator -->\nold\n<!-- end of table -->\nafter\n")
    bench_page.refresh(file, operator, ["operator"], None, None)
    text = file.read_text()
    (line,) = re.findall(r"^\| qwen2.5-vl-7b .*$", text, flags=re.MULTILINE)
    by_name = {row["method"]: row for row in operator["rows"]}
    kept, cat = by_name["kept-10%"], by_name["dynamic-cat"]
    assert f"| {kept['ratio']:.2f} of {kept['bytes_ratio']:.2f} |" in line and f"| {cat['ratio']:.2f} |" in line
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "Left out: 2 cells" in text


def test_what_failed_is_said_in_the_tables(operator: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "seconds": None, "ratio": None, "failed": "relative error 1"} for row in operator["rows"][-1:]]
    spoilt = {**operator, "rows": [*operator["rows"][:-1], *rows]}
    bench_page.refresh(tmp_path / "page.md", spoilt, ["operator"], None, None)
    assert "| wrong output |" in (tmp_path / "page.md").read_text()
    assert "(relative error 1)" in level_tables.cells(rows, "operator")[0][3]


def test_a_page_without_a_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.md").write_text("nothing\n")
    assert command.main(["--quick", "--report", str(tmp_path / "page.md")]) == 2
    assert "<!-- table: bench-cpu operator -->" in capsys.readouterr().err


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
        (["--methods", "kept"], "--methods kept: there is full-segments, fp8"),
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
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
