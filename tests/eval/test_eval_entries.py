"""The methods of an evaluation: how rows are named, which are chosen, what their settings say."""

import re
from typing import Any

import pytest

from kvcapsule.cli.results import command_line, shown_path
from kvcapsule.errors import InputError
from kvcapsule.eval import main as command
from kvcapsule.eval.entries import FIXED, FULL, RIVALS, TEXT, build, chosen, entries, family_of, open_capsules
from kvcapsule.eval.equal_bytes import PerLayer
from kvcapsule.methods.method import Method
from kvcapsule.policy import POLICIES


def test_rows_are_named_after_the_family_unless_that_is_ambiguous(tmp_path, make_capsule) -> None:
    for name in ("a", "b"):
        make_capsule(0.2).save_pretrained(tmp_path / name)
    make_capsule(1, "identity").save_pretrained(tmp_path / "c")
    assert list(open_capsules([str(tmp_path / "a"), str(tmp_path / "c")])) == ["kvcapsule", "identity"]
    assert list(open_capsules([str(tmp_path / "a"), str(tmp_path / "b")])) == ["kvcapsule:a", "kvcapsule:b"]


def test_chosen_methods() -> None:
    assert chosen([], ["kvcapsule"]) == ["kvcapsule", "post-vision-attention", "evenly-spaced", "int4"]
    assert chosen(["int4", "full", "kvcapsule"], ["kvcapsule"]) == ["kvcapsule", "int4"]
    assert chosen(["int2", "int3", "int8"], ["kvcapsule"]) == ["int8", "int3", "int2"]
    assert chosen(["full"], ["kvcapsule"]) == []


def test_settings_of_the_entries(make_capsule) -> None:
    """A policy's are its fields; a list where layers differ."""
    named = {"kvcapsule": ("some/capsule", make_capsule(0.2))}

    def turned(name: str) -> Method:
        return (
            PerLayer([build(name, {}, budget) for budget in (0.2, 0.2, 0.1, 0.1)])
            if name == "evenly-spaced"
            else build(name, {}, 0.2)
        )

    found = entries(["kvcapsule", "evenly-spaced", "snapkv", "int4", "kivi4"], named, turned, "kvcapsule")
    assert [entry.family for entry in found] == ["full", "kvcapsule", *["token-pruning"] * 2, *["quantisation"] * 2]
    made = {entry.name: entry.settings for entry in found}
    assert made[FULL] == {}
    assert made["kvcapsule"]["capsule"] == "some/capsule" and made["kvcapsule"]["key_ratios"] == 0.2
    assert made["evenly-spaced"] == {
        "policy": "evenly-spaced",
        "retention": [0.2, 0.2, 0.1, 0.1],
        "matched_to": "kvcapsule",
    }
    snapkv = {"policy": "snapkv", "retention": 0.2, "window": 32, "kernel": 7, "pooling": "avg"}
    assert made["snapkv"] == {**snapkv, "matched_to": "kvcapsule"}
    assert made["int4"] == {"policy": "quantized", "bits": 4}
    assert made["kivi4"] == {"policy": "kivi", "bits": 4, "group": 32}


def test_a_policy_that_drops_tokens_is_pruning_with_and_without_a_budget_setting() -> None:
    names = ["int8", "kivi2", "fp8", "turboquant2", "akvq-vl", "r-kv"]
    families = {entry.name: entry.family for entry in entries(names, {}, no_rival, None)}
    assert families.pop("r-kv") == "token-pruning"
    assert families == {FULL: FULL, **dict.fromkeys(names[:-1], "quantisation")}
    assert {family_of(name) for name in RIVALS} == {"token-pruning"}
    assert [family_of(name, TEXT) for name in ("text-pruning", "quantized-text")] == ["token-pruning", "quantisation"]


def no_rival(name: str) -> Method:
    raise AssertionError(f"{name} has a budget setting")


def test_every_policy_can_be_named() -> None:
    """By its registration alone; `full` is the row of the full cache, and `quantized` has a row for each width."""
    assert set(POLICIES) - {*RIVALS, *FIXED} == {"full", "quantized"}
    assert {"text-pruning", "quantized-text"} <= set(TEXT)
    assert not {"snapkv", "full", "quantized", "look-m"} & set(TEXT), (
        "what keeps all text raw, or stores it with the image"
    )


@pytest.mark.parametrize(
    ("name", "settings", "budget", "complaint"),
    [
        ("snapkv", {"windw": 3}, 0.1, "snapkv has no setting 'windw'; it has window, kernel, pooling."),
        ("snapkv", {"retention": 0.2}, 0.1, "snapkv has no setting 'retention'"),
        ("snapkv", {"window": 0}, 0.1, "snapkv: window 0"),
        ("snapkv", {"window": "wide"}, 0.1, "snapkv: "),
        ("full", {"bits": 3}, None, "it has none"),
        ("quantized", {}, None, "quantized: "),
    ],
)
def test_wrong_settings(name: str, settings: dict[str, Any], budget: float | None, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        build(name, settings, budget)


def test_reports_show_no_places(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(str(tmp_path / "runs" / "demo")) == "runs/demo"
    assert shown_path("/home/somebody/demo") == "demo"
    assert shown_path("org/name") == "org/name"
    shown = command_line(
        command.PROG, ["--capsule", "/home/somebody/demo", "--json=/home/somebody/x.json", "--data.size", "3"]
    )
    assert shown == "kvcapsule eval --capsule demo --json=x.json --data.size 3"
