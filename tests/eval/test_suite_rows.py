"""The rows that come of a suite."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
from support.suite_files import CAPSULE, refused_line, rows_of

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.transform import TransformConfig
from kvcapsule.eval.entries import RIVALS
from kvcapsule.eval.equal_bytes import TOLERANCE
from kvcapsule.eval.suite.entries import EntryContext
from kvcapsule.eval.suite.suite import load
from kvcapsule.policy import POLICIES


def test_a_suite_may_name_the_baselines(vlm, tmp_path, suite_file) -> None:
    """Also the one that has to know the number of the model's layers."""
    pruning = ["random", "streaming-llm", "snapkv", "h2o", "pyramidkv"]
    entries = [
        *({"method": name, "compression": 4} for name in pruning),
        *({"method": name} for name in ("kivi4", "kivi2", "r-kv")),
    ]
    rows = rows_of(vlm, tmp_path, "--suite", suite_file(entries))
    assert list(rows) == ["full", *(f"{name}-4x" for name in pruning), "kivi4", "kivi2", "r-kv"]
    for name in pruning:
        assert rows[f"{name}-4x"]["compression"] == pytest.approx(4, rel=0.01), name
        settings = rows[f"{name}-4x"]["settings"]
        assert {"family": "token-pruning", "policy": name, "retention": 0.25}.items() <= settings.items()
        assert set(settings) == {"family", "policy", *(field.name for field in fields(POLICIES[name]))}
    assert rows["kivi2"]["settings"] == {"family": "quantisation", "policy": "kivi", "bits": 2, "group": 32}
    assert rows["kivi2"]["compression"] > rows["kivi4"]["compression"] > 4
    assert rows["r-kv"]["family"] == rows["r-kv"]["settings"]["family"] == "token-pruning"


def test_rows_of_a_suite(vlm, tmp_path, suite_file, put_capsule) -> None:
    folder = put_capsule("half", 0.5)
    entries = [
        CAPSULE,
        {"capsule": "half", "latent_bits": 4},
        {"method": "int8"},
        {"method": "post-vision-attention", "compression": 4},
        {"method": "evenly-spaced", "compression": 2.4},
    ]
    rows = rows_of(vlm, tmp_path, "--suite", suite_file(entries), "--suite-capsules", str(folder), "--train", "false")
    assert list(rows) == ["full", "half", "half+int4", "int8", "post-vision-attention-4x", "evenly-spaced-2.4x"]
    families = ["full", "kvcapsule", "kvcapsule+quantisation", "quantisation", "token-pruning", "token-pruning"]
    assert [row["family"] for row in rows.values()] == families
    assert [row["settings"].get("family", "full") for row in rows.values()] == families
    # 49 and 82 of 196 tokens; nothing is timed unless it is asked for.
    assert rows["post-vision-attention-4x"]["compression"] == pytest.approx(196 / 49, rel=1e-3)
    assert rows["evenly-spaced-2.4x"]["compression"] == pytest.approx(196 / 82, rel=1e-3)
    assert rows["evenly-spaced-2.4x"]["settings"] == {
        "family": "token-pruning",
        "policy": "evenly-spaced",
        "retention": pytest.approx(1 / 2.4),
    }
    assert rows["half"]["settings"]["compression"] == 2 and rows["half"]["settings"]["capsule"] == "half"
    assert all(row["prefill_ratio"] is None for row in rows.values())
    for row in rows.values():
        assert row["compression16"] == pytest.approx(row["compression"] / 2)


def test_latents_in_fewer_bits(vlm, tmp_path, suite_file, put_capsule) -> None:
    folder = put_capsule("half", 0.5)
    entries = [{"capsule": "half", "latent_bits": 8}, CAPSULE, {"capsule": "half", "latent_bits": 1}]
    rows = rows_of(vlm, tmp_path, "--suite", suite_file(entries), "--suite-capsules", str(folder))
    plain, eight, one = rows["half"], rows["half+int8"], rows["half+int1"]
    assert (plain["settings"]["latent_bits"], eight["settings"]["latent_bits"], one["settings"]["latent_bits"]) == (
        0,
        8,
        1,
    )
    assert plain["visual_kv_bytes"] > 3 * eight["visual_kv_bytes"] > 6 * one["visual_kv_bytes"]
    # The row of the capsule itself is what it is without the others: they share its parameters, not its settings.
    alone = rows_of(vlm, tmp_path, "--suite", suite_file(entries), "--suite-capsules", str(folder), "--methods", "half")
    assert list(alone) == ["full", "half"] and alone["half"] == plain
    assert plain["parameter_bytes"] == eight["parameter_bytes"] == one["parameter_bytes"] > 0
    assert abs(eight["kl"] - plain["kl"]) < abs(one["kl"] - plain["kl"])


def test_compression_and_retention_have_one_meaning_each(suite_file) -> None:
    """Of a capsule its compression; of a policy the share that it keeps, however the suite says it."""
    entries = [
        {"name": "a", "train": ["transform", "--compression", 20]},
        {"name": "b", "train": ["kvcapsule", "--compression=20"]},
        {"method": "evenly-spaced", "compression": 20},
        {"method": "evenly-spaced", "retention": 0.05},
    ]
    specs = load(suite_file(entries)).specs
    assert [spec.name for spec in specs[2:]] == ["evenly-spaced-20x", "evenly-spaced-0.05"]
    capsule = SimpleNamespace(config=SimpleNamespace(family="any", codec=IdentityConfig(14)))
    context = EntryContext({"a": ("a", capsule), "b": ("b", capsule)}, lambda *_: None)
    settings = [spec.entry(context).settings for spec in specs]
    assert [of["compression"] for of in settings[:2]] == [20] * 2
    assert [of["retention"] for of in settings[2:]] == [0.05] * 2


def test_a_policy_may_have_settings(vlm, tmp_path, suite_file) -> None:
    entries = [
        {"method": "look-m", "budget": 0.3, "settings": {"merge": "averaged", "recent": 0.2}},
        {"method": "kivi", "settings": {"bits": 4, "group": 16}, "name": "fine"},
        {"method": "quantized", "settings": {"bits": 1}},
        {"method": "int8"},
    ]
    rows = rows_of(vlm, tmp_path, "--suite", suite_file(entries))
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
        {
            "capsule": "shipped",
            "text": {"method": "text-pruning", "retention": 0.5, "settings": {"sinks": 1, "recent": 2}},
        },
        {"capsule": "shipped", "text": {"method": "quantized-text", "settings": {"bits": 1}}, "name": "few"},
    ]
    rows = rows_of(vlm, tmp_path, "--suite", suite_file(entries))
    assert list(rows) == ["full", "shipped", "shipped+text-pruning", "few"]
    plain, pruned, few = (rows[name] for name in list(rows)[1:])
    assert [row["family"] for row in (plain, pruned, few)] == [
        "kvcapsule",
        "kvcapsule+token-pruning",
        "kvcapsule+quantisation",
    ]
    assert len({row["visual_kv_bytes"] for row in (plain, pruned, few)}) == 1
    text = [row["kv_bytes"] - row["visual_kv_bytes"] for row in (plain, pruned, few)]
    assert text[0] > 1.5 * text[1] and text[0] > text[2]
    assert pruned["settings"]["text"] == {"policy": "text-pruning", "retention": 0.5, "sinks": 1, "recent": 2}
    assert pruned["settings"]["capsule"] == plain["settings"]["capsule"] == "shipped"


def test_policies_at_the_bytes_of_an_entry(vlm, tmp_path, suite_file, put_capsule, capsys) -> None:
    """Visual and text together, within 2 %; every policy with a budget by one entry."""
    place = str(put_capsule("shipped", 0.2) / "shipped")
    entries = [
        {"method": "all", "match": "both"},
        {"method": "snapkv", "match": "shipped", "settings": {"window": 8}},
        {"pretrained": place},
        {
            "capsule": "shipped",
            "text": {"method": "text-pruning", "retention": 0.6, "settings": {"recent": 4}},
            "name": "both",
        },
    ]
    quick = ("--data.size", "2")
    rows = rows_of(vlm, tmp_path, "--suite", suite_file(entries), *quick)
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
    alone = rows_of(vlm, tmp_path, "--suite", path, "--methods", "h2o@both", *quick)
    assert list(alone) == ["full", "h2o@both"] and alone["h2o@both"] == rows["h2o@both"]


def test_codes_that_take_no_latent_bits(vlm, tmp_path, suite_file, geometry, capsys) -> None:
    sizes = [(8,) * geometry.layers, (4,) * geometry.layers] * 2
    coded = Capsule(CapsuleConfig("transform", TransformConfig(196, True, *sizes), geometry, "tiny"))
    coded.save_pretrained(tmp_path / "capsules" / "half")
    path = suite_file([CAPSULE, {"capsule": "half", "latent_bits": 4}])
    refused = refused_line(capsys, "--model", vlm, "--suite", path, "--suite-capsules", str(tmp_path / "capsules"))
    assert "the entry half+int4" in refused and "latent_bits" in refused
