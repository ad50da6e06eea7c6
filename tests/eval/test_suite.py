"""Suites: what a file may say, and what is refused."""

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.suite_files import CAPSULE, refused_line

from kvcapsule.data.source import PICTURES
from kvcapsule.eval import main as command
from kvcapsule.eval.entries import RIVALS
from kvcapsule.eval.report import markdown
from kvcapsule.eval.suite.shipped import shipped_suites
from kvcapsule.eval.suite.suite import Suite, load
from kvcapsule.training.families import trainable


def test_the_shipped_suites_are_sound() -> None:
    assert "rate-distortion" in shipped_suites()
    for name in shipped_suites():
        suite = load(name)
        assert suite.specs and suite.name == name
        config = command._parse(["--suite", name])
        # Where a suite has so many rows that timing takes longer than their answers, it is not the default.
        assert (config.suite, config.timing) == (name, name == "policies")


def test_rate_distortion() -> None:
    names = [spec.name for spec in load("rate-distortion").specs]
    assert len(names) == len(set(names)) == 51
    assert {f"transform-{ratio}x" for ratio in ("2.4", "5", "10", "20", "40", "80")} < set(names)
    assert {f"cross-layer-{ratio}x" for ratio in ("2.4", "5", "10", "20", "40", "80", "160")} < set(names)
    assert {"kvcapsule-2.4x+int4", "compact-5x+int4", "int3", "post-vision-attention-2.4x", "evenly-spaced-10x"} < set(
        names
    )
    by_name = {spec.name: spec for spec in load("rate-distortion").specs}
    assert by_name["transform-20x"].arguments == ("transform", "--compression", "20")
    assert by_name["kvcapsule-2.4x"].arguments == ("kvcapsule",)
    config = command._parse(["--suite", "rate-distortion"])
    assert (config.model, config.dtype, config.batch, config.data.size, config.data.split) == (
        "pages-vlm",
        "float32",
        16,
        400,
        "test",
    )


def test_smol_vlm() -> None:
    """Four families at the ratios of the issue, and at 20x a capsule of each data set alone: the same arguments but for
    the data."""
    by_name = {spec.name: spec for spec in load("smol-vlm").specs}
    coded, rows = (
        {"transform": "5 10 20 40", "cross-layer": "10 20 40 80"},
        {"kvcapsule": "2.4 5 10 20 40", "compact": "5 10 20 40"},
    )
    for family, ratios in {**coded, **rows}.items():
        for ratio in ratios.split():
            assert by_name[f"{family}-{ratio}x"].arguments[:3] == (f"smol-vlm-{family}", "--compression", ratio)
    transfer = {spec.name: spec.arguments for spec in load("smol-transfer").specs}
    assert transfer.pop("transform-20x") == by_name["transform-20x"].arguments
    assert transfer == {
        f"transform-20x@{source}": (*by_name["transform-20x"].arguments, "--data.source", source) for source in PICTURES
    }
    folders = {command._parse(["--suite", name]).suite_capsules for name in ("smol-vlm", "smol-transfer")}
    assert folders == {"runs/smol-vlm-capsules"}
    # All learn from the same pictures, so that one harvest serves them.
    recipes = [
        yaml.safe_load((files("kvcapsule.training.recipes") / f"smol-vlm-{family}.yaml").read_text())
        for family in trainable()
    ]
    assert [r["family"] for r in recipes] == trainable()
    for shared in ("model", "batch", "moment_batches", "held_out", "harvests", "data"):
        assert recipes[0][shared] == recipes[1][shared] == recipes[2][shared] == recipes[3][shared]


def test_policies() -> None:
    """Every policy with a budget, by its registration alone, at the bytes of both shipped capsules beside a policy for
    the text."""
    specs = {spec.name: spec for spec in load("policies").specs}
    assert [spec.place for spec in specs.values() if spec.place] == ["pages-vlm-transform", "pages-vlm-kvcapsule"]
    for target in ("transform+text", "kvcapsule+text"):
        assert specs[target].reads == target.removesuffix("+text")
        assert [name for name, spec in specs.items() if spec.matches == target] == [
            *(f"{name}@{target}" for name in RIVALS),
            f"mixkv-adakv@{target}",
        ]


def test_options_of_the_command_line_go_above_those_of_the_suite(suite_file, tmp_path) -> None:
    path = suite_file([{"method": "int4"}], batch=3, data={"size": 7}, timing=True)
    config = command._parse(["--suite", path])
    assert (config.batch, config.data.size, config.data.split, config.timing) == (3, 7, "test", True)
    config = command._parse(["--batch", "5", "--suite", path, "--data.size", "8", "--timing", "false"])
    assert (config.batch, config.data.size, config.timing) == (5, 8, False)
    (tmp_path / "options.yaml").write_text(f"suite: {path}\nbatch: 6\n")
    assert command._parse(["--config", str(tmp_path / "options.yaml")]).batch == 6


def test_names_of_entries(suite_file) -> None:
    suite = load(
        suite_file(
            [
                CAPSULE,
                {"capsule": "half", "latent_bits": 4},
                {"capsule": "half", "latent_bits": 2, "name": "few"},
                {"method": "evenly-spaced", "compression": 2.4},
                {"method": "post-vision-attention", "compression": 10},
                {"method": "int2"},
                {"method": "int2", "name": "two-bits"},
            ]
        )
    )
    assert [s.name for s in suite.specs] == [
        "half",
        "half+int4",
        "few",
        "evenly-spaced-2.4x",
        "post-vision-attention-10x",
        "int2",
        "two-bits",
    ]
    assert suite.specs[0].arguments == ("kvcapsule", "--compression", "2")


def test_what_was_chosen_brings_its_capsules(suite_file) -> None:
    suite: Suite = load(
        suite_file([CAPSULE, {**CAPSULE, "name": "other"}, {"capsule": "half", "latent_bits": 4}, {"method": "int4"}])
    )

    def capsules(*wanted: str) -> list[str]:
        return [spec.name for spec in suite.capsules(suite.chosen(wanted))]

    assert capsules() == ["half", "other"]
    assert capsules("half+int4", "int4") == ["half"]
    assert capsules("full") == capsules("int4") == []


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ("int4", "entries: expected a list"),
        ([], "at least one"),
        (["int4"], "entry 1: expected keys and values"),
        (
            [{"method": "int4"}, {"bits": 4}],
            "entry 2: it has no kind: exactly one of train, pretrained, method, capsule",
        ),
        ([{"method": "int4", "capsule": "x"}], "entry 1: it has method and capsule"),
        ([{"method": "int5"}], "there is no method 'int5'; there are post-vision-attention, evenly-spaced, random, "),
        ([{"method": ["int4"]}], "there is no method"),
        ([{"method": "int4", "compression": 2}], "unknown key compression; an entry like this may have name, method"),
        (
            [{"method": "evenly-spaced", "ration": 2}],
            "unknown key ration; an entry like this may have name, method, compression, retention, budget",
        ),
        ([{"method": "evenly-spaced"}], "evenly-spaced takes a compression of at least 1"),
        ([{"method": "evenly-spaced", "compression": 0.4}], "found 0.4"),
        ([{"method": "evenly-spaced", "compression": "many"}], "found 'many'"),
        ([{"method": "evenly-spaced", "ratio": 5}], "entry 1: ratio is compression now"),
        ([{"method": "evenly-spaced", "budget": 0.5}], "no budget: the share that it keeps is its retention"),
        ([{"method": "look-m", "retention": 0.5}], "no retention: the share that it keeps is its budget"),
        ([CAPSULE, {"capsule": "half", "text": {"method": "text-pruning", "ratio": 2}}], "ratio is compression now"),
        ([{**CAPSULE, "train": ["kvcapsule", "--ratio", 2]}], "entry 1: train: --ratio is --compression now"),
        ([{**CAPSULE, "train": ["kvcapsule", "--ratio=2"]}], "entry 1: train: --ratio is --compression now"),
        ([{"method": "int4"}, {"method": "int4"}], "entry 2: there is a row 'int4' already"),
        ([{"method": "int4", "name": "full"}], "there is a row 'full' already"),
        ([CAPSULE, {"method": "int4", "name": "half"}], "entry 2: there is a row 'half' already"),
        ([{"train": ["kvcapsule"]}], "a capsule needs a name"),
        ([{**CAPSULE, "name": "../half"}], "name '../half'"),
        ([{**CAPSULE, "bits": 2}], "unknown key bits"),
        ([{**CAPSULE, "train": "kvcapsule --compression 2"}], "expected a list of arguments"),
        ([{**CAPSULE, "train": []}], "expected a list of arguments"),
        ([{**CAPSULE, "train": ["kvcapsule", "--output=x"]}], "--output=x is given by the run"),
        ([{**CAPSULE, "train": ["kvcapsule", "--compression", "much"]}], "--compression 'much' is no number"),
        ([{**CAPSULE, "train": ["kvcapsule", "--compression"]}], "--compression '' is no number"),
        ([{"capsule": "half", "latent_bits": 4}], "entry 1: no entry is a capsule 'half'; there are none"),
        ([CAPSULE, {"capsule": "half", "latent_bits": 5}], "latent_bits 5: choose one of 1, 2, 3, 4, 8"),
        ([CAPSULE, {"capsule": "half"}], "latent_bits None"),
        ([CAPSULE, {"capsule": "half", "latent_bits": True}], "latent_bits True"),
        ([{"method": "snapkv", "compression": 2, "retention": 0.5}], "exactly one of them"),
        ([{"method": "snapkv", "retention": 2}], "snapkv takes a retention in (0, 1]; found 2"),
        (
            [{"method": "snapkv", "compression": 2, "settings": {"windw": 3}}],
            "snapkv has no setting 'windw'; it has window, kernel, pooling",
        ),
        ([{"method": "snapkv", "match": "x", "settings": 3}], "settings 3: expected keys and values"),
        ([{"method": "kivi", "settings": {"bits": 5}}], "kivi: 5 bits cannot be packed"),
        ([{"method": "full"}], "there is no method 'full'"),
        ([{"method": "snapkv", "match": "x"}], "entry 1: no entry 'x' has bytes of its own to match; there are none"),
        (
            [{"method": "int4"}, {"method": "all", "match": "h2o@int4"}],
            "entry 2: no entry 'h2o@int4' has bytes of its own to match; there are int4",
        ),
        ([{"method": "all", "compression": 2, "name": "x"}], "method all stands for several rows"),
        ([{"pretrained": "a", "train": ["kvcapsule"]}], "it has train and pretrained"),
        (
            [{"pretrained": "a", "compression": 3}],
            "unknown key compression; an entry like this may have name, pretrained",
        ),
        ([CAPSULE, {"capsule": "half", "text": "text-pruning"}], "text 'text-pruning': expected a policy"),
        (
            [CAPSULE, {"capsule": "half", "text": {"method": "snapkv"}}],
            "there is no method 'snapkv' for text; there are text-pruning, ",
        ),
        ([CAPSULE, {"capsule": "half", "text": {"method": "text-pruning"}}], "text-pruning takes a compression"),
        (
            [CAPSULE, {"capsule": "half", "text": {"method": "quantized-text", "budget": 0.5}}],
            "quantized-text has no setting for how much it keeps: leave budget out",
        ),
        ([CAPSULE, {"capsule": "half", "text": {"method": "quantized-text"}}], "quantized-text: "),
        ([CAPSULE, {"capsule": "half", "text": {"method": "text-pruning", "bits": 1}}], "text: unknown key bits"),
    ],
)
def test_wrong_entries(suite_file, capsys, entries: Any, complaint: str) -> None:
    refused = refused_line(capsys, "--suite", suite_file(entries))
    assert complaint in refused and "mine.yaml" in refused


def test_wrong_suites(suite_file, tmp_path, capsys) -> None:
    assert "no suite 'rate'" in (refused := refused_line(capsys, "--suite", "rate")) and "rate-distortion" in refused
    (tmp_path / "other.yaml").write_text("option: {}\nentries: []\n")
    assert "unknown key option; it may have options and entries" in refused_line(
        capsys, "--suite", str(tmp_path / "other.yaml")
    )
    (tmp_path / "other.yaml").write_text("- int4\n")
    assert "options and entries" in refused_line(capsys, "--suite", str(tmp_path / "other.yaml"))
    (tmp_path / "other.yaml").write_text("entries: [\n")
    assert "cannot be used" in refused_line(capsys, "--suite", str(tmp_path / "other.yaml"))
    for option, value, complaint in (
        ("bach", 3, "'bach' is not accepted"),
        ("ratio", 0.5, "options: --ratio is --budget now"),
        ("batch", "many", "--batch many: a whole number is expected"),
        ("data", {"sice": 3}, "'sice'"),
        ("suite", "other", "--suite excepted"),
    ):
        assert complaint in refused_line(capsys, "--suite", suite_file([{"method": "int4"}], **{option: value}))


def test_options_that_do_not_go_with_a_suite(suite_file, capsys) -> None:
    path = suite_file([{"method": "int4"}])
    for option in (("--budget", "0.5"), ("--capsule", "x")):
        assert "leave out --capsule and --budget" in refused_line(capsys, "--suite", path, *option)
    assert "no method 'int3'; it has full, int4" in refused_line(capsys, "--suite", path, "--methods", "int3")
    assert "give a --suite too" in refused_line(capsys, "--budget", "0.5", "--report", "x.md")


@pytest.mark.parametrize(
    ("suite", "report"), [("rate-distortion", "docs/results-tables.md"), ("policies", "docs/policies-tables.md")]
)
def test_the_makefile_runs_the_suites(suite: str, report: str) -> None:
    root = Path(__file__).resolve().parents[2]
    makefile = (root / "Makefile").read_text()
    rule = makefile[makefile.index(f"\n{suite}:") :].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(rule.split("eval ", 1)[1].replace("$(SUITE_FLAGS)", ""))
    config = command._parse(words)
    assert (config.suite, config.report, config.json) == (suite, report, f"eval/results/{suite}.json")
    markdown.require_place(root / report, suite)
