"""The family of the paper KVCapsule is told from the tool in all that people read, and may be typed by either name."""

from typing import Any

import pytest

from kvcapsule.eval.entries import chosen
from kvcapsule.eval.report.rate_curves import curves
from kvcapsule.eval.report.rows import tables
from kvcapsule.methods.shown_names import shown_name
from kvcapsule.training.options import chosen_recipe


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("kvcapsule", "token-subset (KVCapsule)"),
        ("kvcapsule-2.4x+int4", "token-subset-2.4x+int4"),
        ("kvcapsule:kvcapsule-mlp", "token-subset:kvcapsule-mlp"),
        ("snapkv@kvcapsule+text", "snapkv@token-subset+text"),
        ("kvcapsule+vl-cache", "token-subset+vl-cache"),
        ("runs/kvcapsule/mine", "runs/kvcapsule/mine"),
        ("transform", "transform"),
    ],
)
def test_names(name: str, shown: str) -> None:
    assert shown_name(name) == shown


def _row(method: str, family: str, **values: Any) -> dict[str, Any]:
    row = {"method": method, "family": family, "settings": {}, "accuracy": {"a": 1.0}, "agreement": 1.0, "kl": 0.0}
    sizes = {"visual_kv_bytes": 8, "kv_bytes": 9, "host_kv_bytes": 0, "parameter_bytes": 0, "n": 4}
    ratios = {"compression": 2.0, "compression16": 1.0, "prefill_ratio": 1.0, "tokens_per_s_ratio": 1.0}
    return {**row, **sizes, **ratios, **values}


def test_tables_and_pictures_show_them() -> None:
    rows = [_row("full", "full"), _row("kvcapsule", "kvcapsule")]
    assert [[row.cells[0] for row in table.rows] for table in tables(rows, "")] == [
        ["full", "token-subset (KVCapsule)"]
    ] * 2
    assert [line.label for line in curves(rows)] == ["token-subset (KVCapsule)"]


def test_either_name_may_be_typed() -> None:
    assert chosen(["token-subset", "int4"], ["kvcapsule"]) == ["kvcapsule", "int4"]
    assert chosen_recipe(["token-subset"]).family == chosen_recipe(["--family", "token-subset"]).family == "kvcapsule"
