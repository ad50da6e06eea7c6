"""An evaluation's files: a picture that can be read, JSON that is whole."""

import json
from itertools import combinations
from typing import Any

import pytest
from matplotlib.text import Text

from kvcapsule.atomic_files import to_json
from kvcapsule.cli.results import write_whole
from kvcapsule.eval.report.scatter import draw, picture


def _row(method: str, size: int, score: float) -> dict[str, Any]:
    return {
        "method": method,
        "visual_kv_bytes": size,
        "accuracy": {"a": score, "b": score},
        "compression": 400_000 / size,
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


def test_labels_cover_neither_each_other_nor_a_dot() -> None:
    figure = picture(CROWDED, "crowded")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    labels = [text for text in axes.texts if text.get_text()]
    assert {label.get_text().split(" (")[0] for label in labels} == {row["method"] for row in CROWDED}
    # Of the words alone: an annotation's own extent holds its line to the dot too.
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    dots = [axes.transData.transform((row["visual_kv_bytes"], row["accuracy"]["a"])) for row in CROWDED]
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)


def test_capsules_and_quantisation_look_different() -> None:
    (axes,) = picture(
        [_row("kvcapsule", 80_000, 0.9), _row("int4", 60_000, 0.9), _row("int3", 50_000, 0.9)], "title"
    ).axes
    capsule, int4, int3 = (line.get_color() for line in axes.lines)
    assert int4 == int3 != capsule


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_in_the_format_of_its_name(tmp_path, suffix: str, begins: bytes) -> None:
    draw(picture(CROWDED, "title"), tmp_path / "new" / f"picture{suffix}")
    assert (tmp_path / "new" / f"picture{suffix}").read_bytes().startswith(begins)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_json_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "result.json"
    write_whole(path, to_json({"a": 1}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_whole(path, to_json({"a": float("nan")}))
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
