"""`kvcapsule eval`: it writes what it was asked for, and refuses what it cannot use."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.eval import main as command
from kvcapsule.eval import run
from kvcapsule.eval.equal_bytes import TOLERANCE
from kvcapsule.eval.main import main
from kvcapsule.methods.shown_names import shown_name
from kvcapsule.testbeds import pages
from kvcapsule.vlm.geometry import KVGeometry

QUICK = ("--data.size", "4", "--batch", "4", "--max-new-tokens", "4", "--timing", "false")


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return pages.pages("test", 4)


@pytest.fixture(scope="module")
def capsule_folder(tmp_path_factory, make_capsule) -> Path:
    folder = tmp_path_factory.mktemp("capsules") / "fifth"
    make_capsule(0.2).save_pretrained(folder, metrics={"train": {"loss": 0.5}})
    return folder


def test_command_writes_what_it_was_asked_for(vlm, capsule_folder, tmp_path, capsys) -> None:
    files = [
        "--json",
        str(tmp_path / "out" / "eval.json"),
        "--plot",
        str(tmp_path / "out" / "eval.png"),
        "--save-metrics",
        "true",
    ]
    assert main(["--model", vlm, "--capsule", str(capsule_folder), *QUICK, *files]) == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    by_name = {row["method"]: row for row in result["rows"]}
    assert list(by_name) == ["full", "kvcapsule", "post-vision-attention", "evenly-spaced", "int4"]
    assert list(by_name["full"]["accuracy"]) == list(pages.TASKS)
    for name in ("post-vision-attention", "evenly-spaced"):
        for key in ("kv_bytes", "visual_kv_bytes"):
            assert by_name[name][key] == pytest.approx(by_name["kvcapsule"][key], rel=TOLERANCE)
    assert 4 < by_name["kvcapsule"]["compression"] < 5 and 7 < by_name["int4"]["compression"] < 8
    with Image.open(tmp_path / "out" / "eval.png") as drawn:
        assert drawn.size[0] > 1000
    metrics = json.loads((capsule_folder / "metrics.json").read_text())
    assert metrics == {"train": {"loss": 0.5}, "eval": result}
    assert "post-vision-attention" in (capsule_folder / "README.md").read_text()
    printed = capsys.readouterr()
    assert all(shown_name(name) in printed.out for name in by_name)
    assert "answers" in printed.err
    # The model has float32: the other compression is shown beside it.
    assert "of 16-bit" in printed.out


def test_command_takes_the_widths_that_are_not_there_by_default(vlm, tmp_path) -> None:
    arguments = ["--methods", "int8", "--methods", "int3", "--methods", "int2", "--json", str(tmp_path / "eval.json")]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    _, int8, int3, int2 = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["settings"]["bits"] for row in (int8, int3, int2)] == [8, 3, 2]
    assert int8["visual_kv_bytes"] > int3["visual_kv_bytes"] > int2["visual_kv_bytes"]
    assert int8["kl"] < int3["kl"] < int2["kl"]


def test_command_without_a_capsule_by_a_file_of_options(vlm, tmp_path) -> None:
    (tmp_path / "suite.yaml").write_text("budget: 0.5\nmethods: [evenly-spaced]\n")
    arguments = ["--config", str(tmp_path / "suite.yaml"), "--json", str(tmp_path / "eval.json")]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    full, spaced = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert (full["method"], spaced["method"]) == ("full", "evenly-spaced")
    assert spaced["settings"] == {"policy": "evenly-spaced", "retention": 0.5}
    assert spaced["compression"] == pytest.approx(2.0, rel=0.01)


def test_command_takes_several_capsules(vlm, capsule_folder, tmp_path, make_capsule) -> None:
    make_capsule(0.1).save_pretrained(tmp_path / "tenth")
    arguments = [
        "--capsule",
        str(tmp_path / "tenth"),
        "--capsule",
        str(capsule_folder),
        "--json",
        str(tmp_path / "eval.json"),
    ]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    by_name = {row["method"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert by_name["kvcapsule:tenth"]["compression"] > 1.8 * by_name["kvcapsule:fifth"]["compression"]
    assert by_name["evenly-spaced"]["settings"]["matched_to"] == "kvcapsule:tenth"
    assert by_name["evenly-spaced"]["kv_bytes"] == pytest.approx(by_name["kvcapsule:tenth"]["kv_bytes"], rel=TOLERANCE)


def test_a_budget_is_each_methods_own(vlm, tmp_path) -> None:
    """Of the visual tokens (196 of about 215), or of all; methods with commas, in the order of the registry."""
    arguments = [
        "--methods",
        "look-m,snapkv",
        "--methods=int4",
        "--budget",
        "0.25",
        "--json",
        str(tmp_path / "eval.json"),
    ]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    full, snapkv, look, int4 = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["method"] for row in (snapkv, look, int4)] == ["snapkv", "look-m", "int4"]
    assert snapkv["settings"]["retention"] == look["settings"]["budget"] == 0.25
    assert snapkv["compression"] == pytest.approx(4, rel=0.01)
    assert look["kv_bytes"] < 0.27 * full["kv_bytes"] < snapkv["kv_bytes"]


def test_lists_of_the_command_line_replace_those_of_a_file(tmp_path) -> None:
    (tmp_path / "options.yaml").write_text("budget: 0.5\nmethods: [evenly-spaced, int4]\n")
    options = ["--config", str(tmp_path / "options.yaml")]
    parse = lambda *words: command._parse([*options, *words])  # noqa: E731
    assert parse().methods == ["evenly-spaced", "int4"]
    assert parse("--methods", "int8", "--batch", "3", "--methods=int3,h2o").methods == ["int8", "int3", "h2o"]
    assert command.build_parser().read(["--capsule", "a,b", "--capsule", "c"]).capsule == ["a,b", "c"]


@pytest.fixture
def questions_file(tmp_path, images) -> Callable[..., str]:
    """questions_file(answer="x"): a .jsonl of two questions about one page, with these columns beside image and
    prompt."""

    def build(image: str | None = None, **columns: Any) -> str:
        images[0].save(tmp_path / "page.png")
        row = {"image": image or str(tmp_path / "page.png"), "prompt": "What?", **columns}
        (tmp_path / "own.jsonl").write_text(2 * (json.dumps(row) + "\n"))
        return str(tmp_path / "own.jsonl")

    return build


def test_own_data_without_tasks(vlm, questions_file, tmp_path) -> None:
    source = questions_file(answer="x")
    arguments = ["--data.source", source, "--data.split", "all", "--budget", "0.5", "--methods", "int4"]
    assert main(["--model", vlm, *QUICK, *arguments, "--json", str(tmp_path / "eval.json")]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert [(row["accuracy"], row["n"]) for row in result["rows"]] == [({"own": 0.0}, 2)] * 2
    assert result["metric"] == "relaxed-exact"
    assert str(tmp_path) not in json.dumps(result)


def _refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    complaint = printed.err.strip().splitlines()[-1]
    assert complaint.startswith("kvcapsule eval: ") and "Traceback" not in printed.err
    assert printed.out == ""
    return complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--budget", "0"), "outside (0, 1]"),
        (("--budget", "10"), "outside (0, 1]"),
        (("--budget", "0.5", "--capsule", "x"), "--budget is for runs without a capsule"),
        (("--budget", "2"), "--budget 2.0 is outside (0, 1]"),
        (("--ratio=0.5",), "--ratio is --budget now"),
        (("--budget", "0.5", "--ratio", "0.5"), "--ratio is --budget now"),
        (("--methods",), "--methods"),
        (
            ("--budget", "0.5", "--methods", "inf4"),
            "there is no method 'inf4'; this run has full, post-vision-attention",
        ),
        ((), "give a --capsule"),
        (("--capsule", "/no/such/capsule"), "/no/such/capsule"),
        (("--budget", "0.5", "--model", "/no/such/model"), "cannot load"),
        (("--budget", "0.5", "--max-new-tokens", "1"), "at least 2"),
        (("--budget", "0.5", "--metric", "bleu"), "--metric bleu is unknown: name one of auto, exact, "),
        (("--budget", "0.5", "--batch", "0"), "--batch 0"),
        (("--budget", "0.5", "--batch", "many"), "many"),
        (("--budget", "0.5", "--plot", "x.bmp"), ".png, .svg, .pdf"),
        (("--budget", "0.5", "--json", "/dev/null/x.json"), "cannot be written"),
        (("--budget", "0.5", "--device", "abacus"), "--device abacus"),
        (("--budget", "0.5", "--save-metrics", "true"), "exactly one --capsule"),
        (("--rato", "0.5"), "rato"),
        (("--budget", "0.5", "--share-prefil", "false"), "share"),
        (("--budget", "0.5", "--json"), "--json needs a FILE, or - to print the JSON to standard output"),
        (("--json", "--budget", "0.5"), "--json needs a FILE"),
    ],
)
def test_wrong_arguments(capsys, arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in _refused(capsys, *arguments)


def test_renamed_options_of_a_file_are_refused(capsys, tmp_path) -> None:
    (tmp_path / "options.yaml").write_text("methods: [int4]\nratio: 0.5\n")
    assert "--ratio is --budget now" in _refused(capsys, "--config", str(tmp_path / "options.yaml"))


def test_options_may_have_dashes_or_underscores(capsys) -> None:
    assert command._parse(["--max-new-tokens", "7"]) == command._parse(["--max_new_tokens=7"])
    assert "--max-new-tokens 1: " in _refused(capsys, "--budget", "0.5", "--max_new_tokens", "1")


def test_json_on_stdout_takes_the_place_of_the_tables(vlm, capsys) -> None:
    assert main(["--model", vlm, *QUICK, "--methods", "int4", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["rows"]] == ["full", "int4"] and result["metric"] == "demo"


def test_wrong_data(vlm, questions_file, capsys, tmp_path) -> None:
    words = ("--model", vlm, "--budget", "0.5")
    assert "at least one question" in _refused(capsys, *words, "--data.size", "0")
    assert "no split 'exam'" in _refused(capsys, *words, "--data.split", "exam")
    assert "no column 'answer'" in _refused(capsys, *words, "--data.source", questions_file(label="x"))
    words += ("--data.split", "all", "--data.source")
    assert "line 1 of own.jsonl: the answer is missing" in _refused(capsys, *words, questions_file(answer=None))
    (tmp_path / "broken.png").write_text("this is no image")
    broken = questions_file(str(tmp_path / "broken.png"), answer="x")
    assert "line 1 of own.jsonl: " in (line := _refused(capsys, *words, broken)) and "broken.png" in line
    lost = questions_file(str(tmp_path / "lost.png"), answer="x")
    assert "line 1 of own.jsonl: there is no image" in _refused(capsys, *words, lost)
    (tmp_path / "empty.csv").write_text("image,prompt,answer\n")
    assert "empty.csv" in _refused(capsys, *words, str(tmp_path / "empty.csv"))


def test_no_questions(vlm, rows, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run.source, "load", lambda _: rows.select([]))
    assert "holds no questions" in _refused(capsys, "--model", vlm, "--budget", "0.5")


def test_capsule_of_another_model(vlm, tmp_path, geometry, capsys) -> None:
    other = KVGeometry.from_dict({**geometry.to_dict(), "kv_heads": 4})
    Capsule(CapsuleConfig("identity", IdentityConfig(14), other, "other")).save_pretrained(tmp_path / "other")
    assert "kv_heads: 4 != 2" in _refused(capsys, "--model", vlm, "--capsule", str(tmp_path / "other"))


def test_damaged_metrics_are_not_replaced(vlm, tmp_path, make_capsule, capsys) -> None:
    make_capsule(0.2).save_pretrained(tmp_path / "capsule")
    metrics = tmp_path / "capsule" / "metrics.json"
    metrics.write_text("{")
    assert (
        main(
            [
                "--model",
                vlm,
                "--capsule",
                str(tmp_path / "capsule"),
                "--methods",
                "full",
                *QUICK,
                "--save-metrics",
                "true",
            ]
        )
        == 2
    )
    assert "damaged" in capsys.readouterr().err
    assert metrics.read_text() == "{"


def test_a_defect_is_not_taken_for_wrong_input(monkeypatch) -> None:
    monkeypatch.setattr(run, "run", lambda *_: torch.empty(2).view(3))
    with pytest.raises(RuntimeError):
        main(["--budget", "0.5"])
    monkeypatch.setattr(run, "run", lambda *_: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting"):
        main(["--budget", "0.5"])


def test_help_explains_every_option(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in command.EvalConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in printed
    assert "Most tokens of an answer, the end token included." in printed
