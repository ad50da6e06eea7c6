"""Suites: what a file may say, the rows that come of it, capsules that are missing, the table in a document, the picture."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from matplotlib.text import Text
from PIL import Image

from kvcapsule.capsule import Capsule, CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.transform import TransformConfig
from kvcapsule.eval import main as command
from kvcapsule.eval import results, trained
from kvcapsule.eval.curves import curves, picture
from kvcapsule.eval.main import main
from kvcapsule.eval.matching import TOLERANCE
from kvcapsule.eval.methods import RIVALS
from kvcapsule.eval.plot import draw
from kvcapsule.eval.specs import Bench
from kvcapsule.eval.suite import Suite, load, shipped_suites
from kvcapsule.policy import POLICIES

QUICK = ("--data.size", "4", "--batch", "4", "--max-new-tokens", "4")
CAPSULE = {"name": "half", "train": ["kvcapsule", "--ratio", 0.5]}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, model, processor) -> str:
    folder = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def suite_file(tmp_path) -> Callable[..., str]:
    """suite_file([entry, ...], option=value): a suite named mine."""

    def build(entries: Any, **options: Any) -> str:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"options": options, "entries": entries}))
        return str(tmp_path / "mine.yaml")

    return build


def _refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("kvcapsule eval: ")
    return complaint


# Files


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
    assert len(names) == len(set(names)) == 29
    assert {f"transform-{ratio}x" for ratio in ("2.4", "5", "10", "20", "40", "80")} < set(names)
    assert {"kvcapsule-2.4x+int4", "compact-5x+int4", "int3", "post-vision-attention-2.4x", "evenly-spaced-10x"} < set(names)
    by_name = {spec.name: spec for spec in load("rate-distortion").specs}
    assert by_name["transform-20x"].arguments == ("transform", "--ratio", "20")
    assert by_name["kvcapsule-2.4x"].arguments == ("kvcapsule",)
    config = command._parse(["--suite", "rate-distortion"])
    assert (config.model, config.dtype, config.batch, config.data.size, config.data.split) == ("pages-vlm", "float32", 16, 400, "test")


def test_policies() -> None:
    """Every policy with a dial, by its registration alone, at the bytes of both shipped capsules beside a policy for the text."""
    specs = {spec.name: spec for spec in load("policies").specs}
    assert [spec.place for spec in specs.values() if spec.place] == ["pages-vlm-transform", "pages-vlm-kvcapsule"]
    for target in ("transform+text", "kvcapsule+text"):
        assert specs[target].reads == target.removesuffix("+text")
        assert [name for name, spec in specs.items() if spec.matches == target] == [f"{name}@{target}" for name in RIVALS]


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
                {"method": "evenly-spaced", "ratio": 2.4},
                {"method": "post-vision-attention", "ratio": 10},
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
    assert suite.specs[0].arguments == ("kvcapsule", "--ratio", "0.5")


def test_what_was_chosen_brings_its_capsules(suite_file) -> None:
    suite: Suite = load(suite_file([CAPSULE, {**CAPSULE, "name": "other"}, {"capsule": "half", "latent_bits": 4}, {"method": "int4"}]))

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
        ([{"method": "int4"}, {"bits": 4}], "entry 2: it has no kind: exactly one of train, pretrained, method, capsule"),
        ([{"method": "int4", "capsule": "x"}], "entry 1: it has method and capsule"),
        ([{"method": "int5"}], "there is no method 'int5'; there are post-vision-attention, evenly-spaced, random, "),
        ([{"method": ["int4"]}], "there is no method"),
        ([{"method": "int4", "ratio": 2}], "unknown key ratio; an entry like this may have name, method"),
        ([{"method": "evenly-spaced", "ration": 2}], "unknown key ration; an entry like this may have name, method, ratio"),
        ([{"method": "evenly-spaced"}], "evenly-spaced takes a ratio of at least 1"),
        ([{"method": "evenly-spaced", "ratio": 0.4}], "found 0.4"),
        ([{"method": "evenly-spaced", "ratio": "many"}], "found 'many'"),
        ([{"method": "int4"}, {"method": "int4"}], "entry 2: there is a row 'int4' already"),
        ([{"method": "int4", "name": "full"}], "there is a row 'full' already"),
        ([CAPSULE, {"method": "int4", "name": "half"}], "entry 2: there is a row 'half' already"),
        ([{"train": ["kvcapsule"]}], "a capsule needs a name"),
        ([{**CAPSULE, "name": "../half"}], "name '../half'"),
        ([{**CAPSULE, "bits": 2}], "unknown key bits"),
        ([{**CAPSULE, "train": "kvcapsule --ratio 2"}], "expected a list of arguments"),
        ([{**CAPSULE, "train": []}], "expected a list of arguments"),
        ([{**CAPSULE, "train": ["kvcapsule", "--output=x"]}], "--output=x is given by the run"),
        ([{**CAPSULE, "train": ["kvcapsule", "--ratio", "much"]}], "--ratio 'much' is no number"),
        ([{**CAPSULE, "train": ["kvcapsule", "--ratio"]}], "--ratio '' is no number"),
        ([{"capsule": "half", "latent_bits": 4}], "entry 1: no entry is a capsule 'half'; there are none"),
        ([CAPSULE, {"capsule": "half", "latent_bits": 5}], "latent_bits 5: choose one of 1, 2, 3, 4, 8"),
        ([CAPSULE, {"capsule": "half"}], "latent_bits None"),
        ([CAPSULE, {"capsule": "half", "latent_bits": True}], "latent_bits True"),
        ([{"method": "snapkv", "ratio": 2, "budget": 0.5}], "exactly one of them"),
        ([{"method": "snapkv", "budget": 2}], "snapkv takes a budget in (0, 1]; found 2"),
        ([{"method": "snapkv", "ratio": 2, "settings": {"windw": 3}}], "snapkv has no setting 'windw'; it has window, kernel, pooling"),
        ([{"method": "snapkv", "match": "x", "settings": 3}], "settings 3: expected keys and values"),
        ([{"method": "kivi", "settings": {"bits": 5}}], "kivi: 5 bits cannot be packed"),
        ([{"method": "full"}], "there is no method 'full'"),
        ([{"method": "snapkv", "match": "x"}], "entry 1: no entry 'x' has bytes of its own to match; there are none"),
        (
            [{"method": "int4"}, {"method": "all", "match": "h2o@int4"}],
            "entry 2: no entry 'h2o@int4' has bytes of its own to match; there are int4",
        ),
        ([{"method": "all", "ratio": 2, "name": "x"}], "method all stands for several rows"),
        ([{"pretrained": "a", "train": ["kvcapsule"]}], "it has train and pretrained"),
        ([{"pretrained": "a", "ratio": 3}], "unknown key ratio; an entry like this may have name, pretrained"),
        ([CAPSULE, {"capsule": "half", "text": "text-pruning"}], "text 'text-pruning': expected a policy"),
        ([CAPSULE, {"capsule": "half", "text": {"method": "snapkv"}}], "there is no method 'snapkv' for text; there are text-pruning, "),
        ([CAPSULE, {"capsule": "half", "text": {"method": "text-pruning"}}], "text-pruning takes a ratio"),
        ([CAPSULE, {"capsule": "half", "text": {"method": "quantized-text", "budget": 0.5}}], "quantized-text has no dial that budget"),
        ([CAPSULE, {"capsule": "half", "text": {"method": "quantized-text"}}], "quantized-text: "),
        ([CAPSULE, {"capsule": "half", "text": {"method": "text-pruning", "bits": 1}}], "text: unknown key bits"),
    ],
)
def test_wrong_entries(suite_file, capsys, entries: Any, complaint: str) -> None:
    refused = _refused(capsys, "--suite", suite_file(entries))
    assert complaint in refused and "mine.yaml" in refused


def test_wrong_suites(suite_file, tmp_path, capsys) -> None:
    assert "no suite 'rate'" in (refused := _refused(capsys, "--suite", "rate")) and "rate-distortion" in refused
    (tmp_path / "other.yaml").write_text("option: {}\nentries: []\n")
    assert "unknown key option; it may have options and entries" in _refused(capsys, "--suite", str(tmp_path / "other.yaml"))
    (tmp_path / "other.yaml").write_text("- int4\n")
    assert "options and entries" in _refused(capsys, "--suite", str(tmp_path / "other.yaml"))
    (tmp_path / "other.yaml").write_text("entries: [\n")
    assert "cannot be used" in _refused(capsys, "--suite", str(tmp_path / "other.yaml"))
    for option, value, complaint in (
        ("bach", 3, "'bach' is not accepted"),
        ("batch", "many", "Got value: many"),
        ("data", {"sice": 3}, "'sice'"),
        ("suite", "other", "--suite excepted"),
    ):
        assert complaint in _refused(capsys, "--suite", suite_file([{"method": "int4"}], **{option: value}))


def test_options_that_do_not_go_with_a_suite(suite_file, capsys) -> None:
    path = suite_file([{"method": "int4"}])
    for option in (("--ratio", "0.5"), ("--budget", "0.5"), ("--capsule", "x")):
        assert "leave out --capsule and --budget" in _refused(capsys, "--suite", path, *option)
    assert "no method 'int3'; it has full, int4" in _refused(capsys, "--suite", path, "--methods", "int3")
    assert "give a --suite too" in _refused(capsys, "--ratio", "0.5", "--report", "x.md")


# Rows


@pytest.fixture
def put_capsule(tmp_path, random_capsule) -> Callable[..., Path]:
    """put_capsule("half", 0.5): a capsule of that ratio in the suite's folder, as if it had been trained."""

    def build(name: str, ratio: float) -> Path:
        random_capsule(ratio, ratio, 196).save_pretrained(tmp_path / "capsules" / name)
        return tmp_path / "capsules"

    return build


def _rows(vlm: str, tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    assert main(["--model", vlm, *QUICK, "--json", str(tmp_path / "eval.json"), *arguments]) == 0
    return {row["method"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}


def test_a_suite_may_name_the_baselines(vlm, tmp_path, suite_file) -> None:
    """Also the one that has to know the number of the model's layers."""
    pruning = ["random", "streaming-llm", "snapkv", "h2o", "pyramidkv"]
    entries = [*({"method": name, "ratio": 4} for name in pruning), {"method": "kivi4"}, {"method": "kivi2"}]
    rows = _rows(vlm, tmp_path, "--suite", suite_file(entries))
    assert list(rows) == ["full", *(f"{name}-4x" for name in pruning), "kivi4", "kivi2"]
    for name in pruning:
        assert rows[f"{name}-4x"]["compression"] == pytest.approx(4, rel=0.01), name
        settings = rows[f"{name}-4x"]["settings"]
        assert {"family": "token-pruning", "policy": name, "ratio": 0.25}.items() <= settings.items()
        assert set(settings) == {"family", "policy", *(field.name for field in fields(POLICIES[name]))}
    assert rows["kivi2"]["settings"] == {"family": "quantisation", "policy": "kivi", "bits": 2, "group": 32}
    assert rows["kivi2"]["compression"] > rows["kivi4"]["compression"] > 4


def test_rows_of_a_suite(vlm, tmp_path, suite_file, put_capsule) -> None:
    folder = put_capsule("half", 0.5)
    entries = [
        CAPSULE,
        {"capsule": "half", "latent_bits": 4},
        {"method": "int8"},
        {"method": "post-vision-attention", "ratio": 4},
        {"method": "evenly-spaced", "ratio": 2.4},
    ]
    rows = _rows(vlm, tmp_path, "--suite", suite_file(entries), "--suite-capsules", str(folder), "--train", "false")
    assert list(rows) == ["full", "half", "half+int4", "int8", "post-vision-attention-4x", "evenly-spaced-2.4x"]
    families = ["full", "kvcapsule", "kvcapsule+quantisation", "quantisation", "token-pruning", "token-pruning"]
    assert [row["family"] for row in rows.values()] == families
    assert [row["settings"].get("family", "full") for row in rows.values()] == families
    # 49 and 82 of 196 tokens; nothing is timed unless it is asked for.
    assert rows["post-vision-attention-4x"]["compression"] == pytest.approx(196 / 49, rel=1e-3)
    assert rows["evenly-spaced-2.4x"]["compression"] == pytest.approx(196 / 82, rel=1e-3)
    assert rows["evenly-spaced-2.4x"]["settings"] == {"family": "token-pruning", "policy": "evenly-spaced", "ratio": pytest.approx(1 / 2.4)}
    assert rows["half"]["settings"]["ratio"] == 0.5 and rows["half"]["settings"]["capsule"] == "half"
    assert all(row["prefill_ratio"] is None for row in rows.values())
    for row in rows.values():
        assert row["compression16"] == pytest.approx(row["compression"] / 2)


def test_latents_in_fewer_bits(vlm, tmp_path, suite_file, put_capsule) -> None:
    folder = put_capsule("half", 0.5)
    entries = [{"capsule": "half", "latent_bits": 8}, CAPSULE, {"capsule": "half", "latent_bits": 1}]
    rows = _rows(vlm, tmp_path, "--suite", suite_file(entries), "--suite-capsules", str(folder))
    plain, eight, one = rows["half"], rows["half+int8"], rows["half+int1"]
    assert (plain["settings"]["latent_bits"], eight["settings"]["latent_bits"], one["settings"]["latent_bits"]) == (0, 8, 1)
    assert plain["visual_kv_bytes"] > 3 * eight["visual_kv_bytes"] > 6 * one["visual_kv_bytes"]
    # The row of the capsule itself is what it is without the others: they share its parameters, not its settings.
    alone = _rows(vlm, tmp_path, "--suite", suite_file(entries), "--suite-capsules", str(folder), "--methods", "half")
    assert list(alone) == ["full", "half"] and alone["half"] == plain
    assert plain["parameter_bytes"] == eight["parameter_bytes"] == one["parameter_bytes"] > 0
    assert abs(eight["kl"] - plain["kl"]) < abs(one["kl"] - plain["kl"])


def test_ratio_has_one_meaning(suite_file) -> None:
    """The share that is kept, however the suite says it; of a capsule too."""
    entries = [
        {"name": "a", "train": ["transform", "--ratio", 20]},
        {"name": "b", "train": ["kvcapsule", "--ratio=0.05"]},
        {"method": "evenly-spaced", "ratio": 20},
        {"method": "evenly-spaced", "budget": 0.05},
    ]
    specs = load(suite_file(entries)).specs
    assert [spec.name for spec in specs[2:]] == ["evenly-spaced-20x", "evenly-spaced-0.05"]
    capsule = SimpleNamespace(config=SimpleNamespace(family="any", codec=IdentityConfig(14)))
    bench = Bench({"a": ("a", capsule), "b": ("b", capsule)}, lambda *_: None)
    assert [spec.entry(bench).settings["ratio"] for spec in specs] == [0.05] * 4


def test_a_policy_may_have_settings(vlm, tmp_path, suite_file) -> None:
    entries = [
        {"method": "look-m", "budget": 0.3, "settings": {"merge": "averaged", "recent": 0.2}},
        {"method": "kivi", "settings": {"bits": 4, "group": 16}, "name": "fine"},
        {"method": "quantized", "settings": {"bits": 1}},
        {"method": "int8"},
    ]
    rows = _rows(vlm, tmp_path, "--suite", suite_file(entries))
    assert list(rows) == ["full", "look-m-0.3", "fine", "quantized", "int8"]
    found = {"family": "token-pruning", "policy": "look-m", "budget": 0.3, "recent": 0.2, "merge": "averaged"}
    assert rows["look-m-0.3"]["settings"] == found
    assert rows["look-m-0.3"]["kv_bytes"] == pytest.approx(0.3 * rows["full"]["kv_bytes"], rel=0.03)
    assert rows["fine"]["settings"] == {"family": "quantisation", "policy": "kivi", "bits": 4, "group": 16}
    assert rows["quantized"]["visual_kv_bytes"] < rows["int8"]["visual_kv_bytes"] / 4


def test_a_capsule_that_is_there_beside_a_policy_for_the_text(vlm, tmp_path, suite_file, put_capsule) -> None:
    place = str(put_capsule("shipped", 0.5) / "shipped")
    entries = [
        {"pretrained": place},
        {"capsule": "shipped", "text": {"method": "text-pruning", "budget": 0.5, "settings": {"sinks": 1, "recent": 2}}},
        {"capsule": "shipped", "text": {"method": "quantized-text", "settings": {"bits": 1}}, "name": "few"},
    ]
    rows = _rows(vlm, tmp_path, "--suite", suite_file(entries))
    assert list(rows) == ["full", "shipped", "shipped+text-pruning", "few"]
    plain, pruned, few = (rows[name] for name in list(rows)[1:])
    assert [row["family"] for row in (plain, pruned, few)] == ["kvcapsule", "kvcapsule+token-pruning", "kvcapsule+quantisation"]
    assert len({row["visual_kv_bytes"] for row in (plain, pruned, few)}) == 1
    text = [row["kv_bytes"] - row["visual_kv_bytes"] for row in (plain, pruned, few)]
    assert text[0] > 1.5 * text[1] and text[0] > text[2]
    assert pruned["settings"]["text"] == {"policy": "text-pruning", "ratio": 0.5, "sinks": 1, "recent": 2}
    assert pruned["settings"]["capsule"] == plain["settings"]["capsule"] == "shipped"


def test_policies_at_the_bytes_of_an_entry(vlm, tmp_path, suite_file, put_capsule, capsys) -> None:
    """Visual and text together, within 2 %; every policy with a dial by one entry."""
    place = str(put_capsule("shipped", 0.2) / "shipped")
    entries = [
        {"method": "all", "match": "both"},
        {"method": "snapkv", "match": "shipped", "settings": {"window": 8}},
        {"pretrained": place},
        {"capsule": "shipped", "text": {"method": "text-pruning", "budget": 0.6, "settings": {"recent": 4}}, "name": "both"},
    ]
    quick = ("--data.size", "2")
    rows = _rows(vlm, tmp_path, "--suite", suite_file(entries), *quick)
    assert list(rows) == ["full", *(f"{name}@both" for name in RIVALS), "snapkv@shipped", "shipped", "both"]
    for name, row in rows.items():
        if "@" in name:
            target = rows[name.partition("@")[2]]
            assert row["kv_bytes"] == pytest.approx(target["kv_bytes"], rel=TOLERANCE), name
            assert row["settings"]["matched_to"] == target["method"]
            assert {f.name for f in fields(POLICIES[row["settings"]["policy"]])} <= set(row["settings"])
    assert rows["snapkv@shipped"]["settings"]["window"] == 8
    assert "matching the bytes of" in capsys.readouterr().err
    # What is matched need not take part.
    path = suite_file(entries)
    alone = _rows(vlm, tmp_path, "--suite", path, "--methods", "h2o@both", *quick)
    assert list(alone) == ["full", "h2o@both"] and alone["h2o@both"] == rows["h2o@both"]


def test_codes_that_take_no_latent_bits(vlm, tmp_path, suite_file, geometry, capsys) -> None:
    sizes = [(8,) * geometry.layers, (4,) * geometry.layers] * 2
    coded = Capsule(CapsuleConfig("transform", TransformConfig(196, True, *sizes), geometry, "tiny"))
    coded.save_pretrained(tmp_path / "capsules" / "half")
    path = suite_file([CAPSULE, {"capsule": "half", "latent_bits": 4}])
    refused = _refused(capsys, "--model", vlm, "--suite", path, "--suite-capsules", str(tmp_path / "capsules"))
    assert "the entry half+int4" in refused and "latent_bits" in refused


# Capsules


def test_missing_capsules_are_refused_with_the_commands(vlm, tmp_path, suite_file, put_capsule, capsys) -> None:
    folder = put_capsule("there", 0.5)
    entries = [CAPSULE, {"name": "there", "train": ["kvcapsule"]}, {"name": "fifth", "train": ["kvcapsule", "--ratio", "0.2"]}]
    arguments = ["--model", vlm, "--suite", suite_file(entries), "--suite-capsules", str(folder), "--train", "false"]
    refused = _refused(capsys, *arguments)
    assert "2 of the suite's capsules are missing" in refused
    expected = [
        f"kvcapsule train kvcapsule --ratio {ratio} --model {vlm} --output {folder / name}"
        for name, ratio in (("half", 0.5), ("fifth", 0.2))
    ]
    assert refused.endswith(f"Run: {' && '.join(expected)}")


def test_missing_capsules_are_trained(vlm, tmp_path, suite_file, capsys) -> None:
    """By the real command, once; the second run finds them."""
    sizes = ["--data.size", 12, "--held_out", 4, "--batch", 4, "--moment_batches", 2, "--optim.soft_steps", 0, "--optim.hard_steps", 1]
    path = suite_file([{"name": "tenth", "train": ["kvcapsule", "--ratio", 0.1, *sizes]}], dtype="float32")
    arguments = ["--suite", path, "--suite-capsules", str(tmp_path / "capsules"), "--threads", str(torch.get_num_threads())]
    rows = _rows(vlm, tmp_path, *arguments)
    shown = capsys.readouterr().err
    assert "kvcapsule train kvcapsule --ratio 0.1 --data.size 12" in shown and f"--model {vlm} --output" in shown
    assert "training tenth" in shown
    assert rows["tenth"]["family"] == "kvcapsule" and 9 < rows["tenth"]["compression"] < 11
    assert _rows(vlm, tmp_path, *arguments, "--train", "false")["tenth"] == rows["tenth"]
    assert "kvcapsule train" not in capsys.readouterr().err


@pytest.fixture
def fake_training(monkeypatch, random_capsule) -> list[list[str]]:
    """The commands that were run, in place of running them."""
    ran: list[list[str]] = []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        ran.append(words)
        if "nonsense" in words:
            return SimpleNamespace(returncode=2, stderr="a warning\nkvcapsule train: no recipe 'nonsense'\n")
        random_capsule(0.5, 0.5, 196).save_pretrained(words[words.index("--output") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(trained.subprocess, "run", run)
    return ran


def test_a_training_that_fails(vlm, tmp_path, suite_file, fake_training, capsys) -> None:
    path = suite_file([{"name": "bad", "train": ["nonsense"]}])
    assert main(["--model", vlm, "--suite", path, "--suite-capsules", str(tmp_path / "capsules")]) == 2
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert last == "kvcapsule eval: the training of bad failed (exit code 2): kvcapsule train: no recipe 'nonsense'"
    assert "a warning" in before


def test_the_training_is_told_what_the_run_is_told(vlm, tmp_path, suite_file, fake_training) -> None:
    entries = [CAPSULE, {"capsule": "half", "latent_bits": 4}, {"method": "int4"}]
    folder = tmp_path / "capsules"
    arguments = ["--suite", suite_file(entries), "--suite-capsules", str(folder), "--device", "cpu"]
    _rows(vlm, tmp_path, *arguments, "--methods", "int4")
    assert not fake_training
    _rows(vlm, tmp_path, *arguments, "--methods", "half+int4")
    train = ["train", "kvcapsule", "--ratio", "0.5", "--model", vlm, "--output", str(folder / "half"), "--device", "cpu"]
    assert fake_training == [[sys.executable, "-m", "kvcapsule", *train]]


def test_a_capsule_that_was_trained_with_other_arguments(vlm, tmp_path, suite_file, fake_training, capsys) -> None:
    folder = tmp_path / "capsules"
    _rows(vlm, tmp_path, "--suite", suite_file([CAPSULE]), "--suite-capsules", str(folder))
    path = suite_file([{**CAPSULE, "train": ["kvcapsule", "--ratio", 0.4]}])
    refused = _refused(capsys, "--model", vlm, "--suite", path, "--suite-capsules", str(folder))
    assert "--ratio 0.5" in refused and "--ratio 0.4" in refused and "delete the folder" in refused
    # Where it was not this command that trained it, nobody can tell.
    (folder / "half.train").unlink()
    _rows(vlm, tmp_path, "--suite", path, "--suite-capsules", str(folder))
    assert len(fake_training) == 1


def test_capsules_lie_in_a_folder_of_the_suites_name(vlm, suite_file, tmp_path, monkeypatch, fake_training) -> None:
    monkeypatch.chdir(tmp_path)
    _rows(vlm, tmp_path, "--suite", suite_file([CAPSULE]))
    assert (tmp_path / "runs" / "mine" / "half" / "config.json").is_file()


# The table


DOCUMENT = (
    "# Title\n\nBefore.\n\n<!-- table: mine -->\nold\n<!-- end of table -->\n\nBehind.\n\n<!-- table: other -->\n<!-- end of table -->\n"
)


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_report_is_refreshed_in_its_place_alone(vlm, tmp_path, suite_file) -> None:
    report = tmp_path / "docs" / "results.md"
    report.parent.mkdir()
    report.write_text(DOCUMENT)
    entries = [{"method": "int2"}, {"method": "evenly-spaced", "ratio": 4}]
    drawn = ("--plot", str(tmp_path / "pictures" / "mine.png"))
    arguments = ("--suite", suite_file(entries), "--report", str(report), *drawn)
    rows = _rows(vlm, tmp_path, *arguments)
    first = report.read_text()
    _rows(vlm, tmp_path, *arguments)
    assert report.read_text() == first
    before, behind = DOCUMENT.split("old\n")
    assert first.startswith(before) and first.endswith(behind) and "old" not in first
    head, _, *cells = _cells(first)
    assert [row[0] for row in cells] == list(rows)
    tasks = list(rows["full"]["accuracy"])
    assert head == [
        *("method", "compression", "at 16 bits", "visual KV bytes a question", "all KV bytes a question", *tasks),
        *("mean", "loss, points", "agreement", "KL", "parameter bytes"),
    ]
    means = [sum(row["accuracy"].values()) / len(tasks) for row in rows.values()]
    for line, row, score in zip(cells, rows.values(), means, strict=True):
        found = dict(zip(head, line, strict=True))
        assert found["visual KV bytes a question"] == f"{row['visual_kv_bytes']:,}"
        assert found["all KV bytes a question"] == f"{row['kv_bytes']:,}"
        assert found["at 16 bits"] == f"{row['compression16']:.2f}x"
        assert float(found["mean"]) == pytest.approx(score, abs=6e-4)
        assert float(found["loss, points"]) == pytest.approx(100 * (means[0] - score), abs=0.06)
        assert not found["loss, points"].startswith("-0.0")
    assert f"`kvcapsule eval --model {Path(vlm).name}" in first and "seed 0" in first and " threads" in first
    assert "[JSON](../eval.json)" in first and "](../pictures/mine.png)" in first
    assert str(tmp_path) not in first


def test_a_report_has_times_and_the_hosts_bytes_where_there_are_such() -> None:
    """Of all rows."""
    row = {**dict.fromkeys(("compression", "compression16"), 2.0), **dict.fromkeys(("visual_kv_bytes", "kv_bytes", "parameter_bytes"), 5)}
    row |= {"accuracy": {"line": 0.5}, "agreement": 1.0, "kl": None, "host_kv_bytes": 0, "prefill_ratio": None, "tokens_per_s_ratio": None}
    (plain, *_) = _cells(results.table([{**row, "method": "full"}, {**row, "method": "a"}]))
    assert not {"on the host", "prefill time", "tokens/s"} & set(plain)
    timed = [{**row, "method": m, "prefill_ratio": p, "tokens_per_s_ratio": 0.5, "host_kv_bytes": 7} for m, p in (("full", 1), ("a", 1.25))]
    head, _, full, a = _cells(results.table(timed))
    assert [line[head.index("prefill time")] for line in (full, a)] == ["1.00", "1.25"]
    assert [line[head.index("on the host")] for line in (full, a)] == ["7", "7"]


def test_a_report_that_is_not_there_is_made(vlm, tmp_path, suite_file) -> None:
    arguments = ("--suite", suite_file([{"method": "int2"}]), "--report", str(tmp_path / "new" / "report.md"))
    _rows(vlm, tmp_path, *arguments)
    first = (tmp_path / "new" / "report.md").read_text()
    assert "| int2 |" in first
    _rows(vlm, tmp_path, *arguments)
    assert (tmp_path / "new" / "report.md").read_text() == first


@pytest.mark.parametrize(
    "text",
    [
        "# Nothing\n",
        "<!-- table: mine -->\n",
        "<!-- end of table -->\n<!-- table: mine -->\n",
        2 * "<!-- table: mine -->\n<!-- end of table -->\n",
        # The end is another table's: what lies between would be lost.
        "<!-- table: mine -->\n<!-- table: other -->\n<!-- end of table -->\n",
    ],
)
def test_a_report_without_a_place_is_refused_before_the_run(tmp_path, suite_file, fake_training, capsys, text: str) -> None:
    report = tmp_path / "report.md"
    report.write_text(text)
    refused = _refused(capsys, "--suite", suite_file([CAPSULE]), "--report", str(report), "--suite-capsules", str(tmp_path / "capsules"))
    assert "<!-- table: mine -->" in refused and report.read_text() == text
    assert not fake_training


def test_the_shipped_document_has_the_place() -> None:
    results.require_place(Path(__file__).resolve().parents[1] / "docs" / "results.md", "rate-distortion")


# The picture

FULL_BYTES = 400_000


def _row(method: str, family: str, compression: float, score: float, **settings: Any) -> dict[str, Any]:
    return {
        "method": method,
        "family": family,
        "settings": settings,
        "visual_kv_bytes": round(FULL_BYTES / compression),
        "accuracy": {"a": score, "b": score},
        "compression": compression,
        "compression16": compression / 2,
    }


ROWS = [
    _row("full", "full", 1, 0.93),
    *(_row(f"transform-{c}x", "transform", 2 * c, s) for c, s in ((5, 0.93), (80, 0.5), (20, 0.91))),
    *(_row(f"kvcapsule-{c}x", "kvcapsule", c, s) for c, s in ((2.4, 0.9), (5, 0.8), (10, 0.6))),
    *(_row(f"compact-{c}x", "compact", c, s) for c, s in ((2.4, 0.9), (5, 0.8), (10, 0.61))),
    _row("kvcapsule-2.4x+int4", "kvcapsule+quantisation", 17, 0.9),
    _row("compact-5x+int4", "compact+quantisation", 17, 0.89),
    *(_row(f"int{bits}", "quantisation", 30 / bits, s) for bits, s in ((8, 0.93), (4, 0.93), (3, 0.93), (2, 0.4))),
    *(_row(f"post-vision-attention-{c}x", "token-pruning", c, s, policy="post-vision-attention") for c, s in ((2.4, 0.4), (5, 0.3))),
    *(_row(f"evenly-spaced-{c}x", "token-pruning", c, s, policy="evenly-spaced") for c, s in ((2.4, 0.4), (5, 0.2))),
]


def test_one_curve_for_each_kind() -> None:
    found = {curve.label: curve for curve in curves(ROWS)}
    assert list(found) == [
        *("transform", "kvcapsule", "compact", "kvcapsule-2.4x+int4", "compact-5x+int4"),
        *("quantisation", "post-vision-attention", "evenly-spaced"),
    ]
    for curve in found.values():
        assert all(a[0] < b[0] for a, b in pairwise(curve.points))
    assert found["transform"].points[0] == (2500, 0.5)
    looks = [(curve.marker, curve.colour) for curve in found.values() if not curve.combined]
    assert len({marker for marker, _ in looks}) == len({colour for _, colour in looks}) == len(looks)
    assert found["kvcapsule-2.4x+int4"].combined and found["kvcapsule-2.4x+int4"].colour == found["kvcapsule"].colour


def test_where_text_is_compressed_too_all_bytes_are_drawn() -> None:
    """And every policy has a look of its own."""
    names = [name for name in POLICIES if name != "full"]
    rows = [{**_row(name, "token-pruning", 2, 0.5, policy=name), "kv_bytes": 7000.0} for name in names]
    assert all(curve.points[0][0] != 7000 for curve in curves(rows))
    rows[0]["settings"]["matched_to"] = "x"
    found = curves(rows)
    assert {curve.points[0][0] for curve in found} == {7000}
    assert len({(curve.marker, curve.colour) for curve in found}) == len(names)


def test_labels_cover_neither_each_other_nor_a_point() -> None:
    figure = picture(ROWS, "crowded")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    labels = [text for text in axes.texts if text.get_text()]
    assert {label.get_text() for label in labels} == {"full cache", *(curve.label for curve in curves(ROWS))}
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = [axes.transData.transform((row["visual_kv_bytes"], row["accuracy"]["a"])) for row in ROWS]
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_the_upper_axis_tells_the_compression_at_16_bits() -> None:
    figure = picture(ROWS, "title")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (upper,) = axes.child_axes
    marks = {label.get_text(): tick for label, tick in zip(upper.get_xticklabels(), upper.get_xticks(), strict=True)}
    assert marks["20x"] == 20
    assert upper.transData.transform((20, 0))[0] == pytest.approx(axes.transData.transform((FULL_BYTES / 40, 0))[0], abs=0.5)


def test_suite_draws_its_curves(vlm, tmp_path, suite_file, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(command.curves, "picture", lambda rows, title: seen.append(len(rows)) or picture(rows, title))
    entries = [{"method": "evenly-spaced", "ratio": ratio} for ratio in (2, 4)]
    _rows(vlm, tmp_path, "--suite", suite_file(entries), "--plot", str(tmp_path / "new" / "eval.png"))
    assert seen == [3]
    with Image.open(tmp_path / "new" / "eval.png") as drawn:
        assert drawn.size[0] > 1000
    draw(picture(ROWS, "title"), tmp_path / "all.svg")
    assert (tmp_path / "all.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(("suite", "report"), [("rate-distortion", "docs/results.md"), ("policies", "docs/policies.md")])
def test_the_makefile_runs_the_suites(suite: str, report: str) -> None:
    root = Path(__file__).resolve().parents[1]
    makefile = (root / "Makefile").read_text()
    rule = makefile[makefile.index(f"\n{suite}:") :].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(rule.split("eval ", 1)[1].replace("$(SUITE_FLAGS)", ""))
    config = command._parse(command._normal(words))
    assert (config.suite, config.report, config.json) == (suite, report, f"eval/results/{suite}.json")
    results.require_place(root / report, suite)
