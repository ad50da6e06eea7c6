"""The picture of a suite: curves that can be told apart."""

from itertools import pairwise
from typing import Any

import pytest
from PIL import Image
from support.suite_files import rows_of

from kvcapsule.eval.report import rate_curves
from kvcapsule.eval.report.picture import save_picture
from kvcapsule.eval.report.rate_curves import curves, picture
from kvcapsule.policy import POLICIES

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
    *(
        _row(f"post-vision-attention-{c}x", "token-pruning", c, s, policy="post-vision-attention")
        for c, s in ((2.4, 0.4), (5, 0.3))
    ),
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


def test_the_legend_names_every_curve_and_covers_no_point() -> None:
    figure = picture(ROWS, "crowded")
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in legend.get_texts()] == ["full cache", *(curve.label for curve in curves(ROWS))]
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_window_extent()) and figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    points = [axes.transData.transform((row["visual_kv_bytes"], row["accuracy"]["a"])) for row in ROWS]
    assert all(axes.get_window_extent().contains(*point) for point in points)


def test_every_policy_fits_into_the_legend() -> None:
    """Two lines for each, as in a suite that matches them to the bytes of two capsules."""
    names = [name for name in POLICIES if name != "full"]
    policies = [_row(f"{name}@{c}", "token-pruning", c, 0.5, policy=name) for name in names for c in (2, 4)]
    figure = picture([ROWS[0], *policies, *ROWS[1:]], "crowded")
    figure.draw_without_rendering()
    assert figure.bbox.y0 <= figure.legends[0].get_window_extent().y0


def test_the_upper_axis_tells_the_compression_at_16_bits() -> None:
    figure = picture(ROWS, "title")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (upper,) = axes.child_axes
    marks = {label.get_text(): tick for label, tick in zip(upper.get_xticklabels(), upper.get_xticks(), strict=True)}
    assert marks["20x"] == 20
    assert upper.transData.transform((20, 0))[0] == pytest.approx(
        axes.transData.transform((FULL_BYTES / 40, 0))[0], abs=0.5
    )


def test_suite_draws_its_curves(vlm, tmp_path, suite_file, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(rate_curves, "picture", lambda rows, title: seen.append(len(rows)) or picture(rows, title))
    entries = [{"method": "evenly-spaced", "compression": compression} for compression in (2, 4)]
    rows_of(vlm, tmp_path, "--suite", suite_file(entries), "--plot", str(tmp_path / "new" / "eval.png"))
    assert seen == [3]
    with Image.open(tmp_path / "new" / "eval.png") as drawn:
        assert drawn.size[0] > 1000
    save_picture(picture(ROWS, "title"), tmp_path / "all.svg")
    assert (tmp_path / "all.svg").read_text().startswith("<?xml")
