"""An evaluation's files: a picture that can be read, JSON that is whole."""

import json
from typing import Any

import pytest

from kvcapsule.atomic_files import to_json
from kvcapsule.cli.results import write_whole
from kvcapsule.eval.report.picture import save_picture
from kvcapsule.eval.report.scatter import picture
from kvcapsule.methods.shown_names import shown_name


def _row(method: str, size: int, score: float) -> dict[str, Any]:
    kinds = {"int": "quantisation", "pos": "token-pruning", "eve": "token-pruning"}
    return {
        "method": method,
        "family": kinds.get(method[:3], method.partition(":")[0]),
        "visual_kv_bytes": size,
        "accuracy": {"a": score, "b": score},
        "compression16": 200_000 / size,
        "agreement": score,
        "n": 100,
    }


CROWDED = [
    _row("full", 400_000, 0.9),
    _row("kvcapsule:ten", 40_000, 0.9),
    _row("kvcapsule:five", 80_000, 0.9),
    _row("post-vision-attention", 40_100, 0.9),
    _row("evenly-spaced", 40_100, 0.9),
    _row("int4", 54_000, 0.9),
    _row("kvcapsule:one-with-a-name-that-is-long", 400_000, 0.4),
]


def test_the_legend_names_every_row_with_its_ratio() -> None:
    """At 16 bits an element, whatever the run had."""
    figure = picture(CROWDED, "crowded")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    ratios = [f"{shown_name(row['method'])} ({row['compression16']:.3g}x at 16 bits)" for row in CROWDED[1:]]
    assert labels == ["full cache, 391 KiB", *ratios]


def looks(rows: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Marker and colour of each row but the full cache's, as drawn."""
    lines = [line for line in picture(rows, "title").axes[0].lines if line.get_marker() not in ("None", "")]
    return [(line.get_marker(), line.get_color()) for line in lines]


def test_no_two_rows_look_the_same() -> None:
    assert len(set(looks(CROWDED))) == len(CROWDED) - 1


def test_capsules_and_quantisation_look_different() -> None:
    rows = [_row("kvcapsule", 80_000, 0.9), _row("int4", 60_000, 0.9), _row("int3", 50_000, 0.9)]
    (_, capsule), (_, int4), (_, int3) = looks([CROWDED[0], *rows])
    assert int4 == int3 != capsule


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_in_the_format_of_its_name(tmp_path, suffix: str, begins: bytes) -> None:
    save_picture(picture(CROWDED, "title"), tmp_path / "new" / f"picture{suffix}")
    assert (tmp_path / "new" / f"picture{suffix}").read_bytes().startswith(begins)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_json_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "result.json"
    write_whole(path, to_json({"a": 1}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_whole(path, to_json({"a": float("nan")}))
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
