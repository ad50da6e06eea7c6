"""The picture of a suite: curves that can be told apart."""

from itertools import pairwise
from typing import Any

import pytest
from PIL import Image
from support.suite_files import QUICK, evaluate

from kvcapsule.codec import FAMILIES
from kvcapsule.eval.report import rate_curves, redraw
from kvcapsule.eval.report.picture import LOOKS, save_picture
from kvcapsule.eval.report.rate_curves import axis, curves, picture
from kvcapsule.policy import POLICIES

FULL_BYTES = 400_000


def _row(method: str, family: str, compression: float, score: float, **settings: Any) -> dict[str, Any]:
    return {
        "method": method,
        "family": family,
        "settings": settings,
        "visual_kv_bytes": round(FULL_BYTES / compression),
        "accuracy": {"a": score, "b": score},
        "agreement": 1 - 2 * abs(0.93 - score) / 3,
        "n": 200,
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
        *("transform", "token-subset (KVCapsule)", "compact", "token-subset-2.4x+int4", "compact-5x+int4"),
        *("quantisation", "post-vision-attention", "evenly-spaced"),
    ]
    for curve in found.values():
        assert all(a["visual_kv_bytes"] < b["visual_kv_bytes"] for a, b in pairwise(curve.rows))
    assert found["transform"].rows[0]["method"] == "transform-80x"
    looks = [(curve.marker, curve.colour) for curve in found.values() if not curve.combined]
    assert len({marker for marker, _ in looks}) == len({colour for _, colour in looks}) == len(looks)
    assert found["token-subset-2.4x+int4"].combined
    assert found["token-subset-2.4x+int4"].colour == found["token-subset (KVCapsule)"].colour


def test_where_text_is_compressed_too_all_bytes_are_drawn() -> None:
    """And every policy has a look of its own."""
    names = [name for name in POLICIES if name != "full"]
    rows = [{**_row(name, "token-pruning", 2, 0.5, policy=name), "kv_bytes": 7000.0} for name in names]
    assert axis(rows)[0] == "visual_kv_bytes"
    rows[0]["settings"]["matched_to"] = "x"
    assert axis(rows)[0] == "kv_bytes"
    drawn = curves(rows)
    assert len({curve.marker for curve in drawn}) == len({curve.colour for curve in drawn}) == len(names)


def test_every_method_has_one_look() -> None:
    names = {*FAMILIES, *POLICIES, "quantisation"} - {"identity", "full", "quantized"}
    assert names == set(LOOKS)
    assert len({marker for marker, _ in LOOKS.values()}) == len({colour for _, colour in LOOKS.values()}) == len(LOOKS)


def test_the_legend_names_every_curve_and_covers_no_point() -> None:
    figure = picture(ROWS, "crowded")
    figure.draw_without_rendering()
    (upper, lower), (legend,) = figure.axes, figure.legends
    assert upper.get_xscale() == "log" and upper.get_yscale() == lower.get_yscale() == "symlog"
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["full cache, 391 KiB", *(curve.label for curve in curves(ROWS))]
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    assert box.y1 <= figure.bbox.y1
    for axes, height in (
        (upper, lambda row: 100 * (0.93 - row["accuracy"]["a"])),
        (lower, lambda row: 1 - row["agreement"]),
    ):
        assert not box.overlaps(axes.get_window_extent())
        points = [axes.transData.transform((row["visual_kv_bytes"], height(row))) for row in ROWS[1:]]
        assert all(axes.get_window_extent().contains(*point) for point in points)
        # Less is better, and stands higher.
        bottom, top = axes.get_ylim()
        assert bottom > top


def test_small_losses_can_be_told_apart() -> None:
    """Beside one of half of all answers, a loss of a point takes a twentieth of the height at least."""
    rows = [ROWS[0], _row("int4", "quantisation", 4, 0.92), _row("int2", "quantisation", 8, 0.4)]
    figure = picture(rows, "title")
    figure.draw_without_rendering()
    upper = figure.axes[0]
    (_, none), (_, one) = (upper.transAxes.inverted().transform(upper.transData.transform((1e5, y))) for y in (0, 1))
    assert none - one > 0.05


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
    axes = figure.axes[0]
    (upper,) = axes.child_axes
    marks = {label.get_text(): tick for label, tick in zip(upper.get_xticklabels(), upper.get_xticks(), strict=True)}
    assert marks["20x"] == 20
    assert upper.transData.transform((20, 0))[0] == pytest.approx(
        axes.transData.transform((FULL_BYTES / 40, 0))[0], abs=0.5
    )


def test_where_few_ratios_fit_there_are_more_marks() -> None:
    figure = picture([ROWS[0], *(_row(f"int{c}", "quantisation", c, 0.9) for c in (3, 4, 5))], "title")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    assert sum(1 for x in axes.get_xticks() if low <= x <= high) >= 4
    (upper,) = axes.child_axes
    low, high = sorted(upper.get_xlim())
    assert sum(1 for ratio in upper.get_xticks() if low <= ratio <= high) >= 4


def test_the_full_cache_alone_has_a_picture() -> None:
    assert len(picture(ROWS[:1], "title").axes) == 2


def test_suite_draws_its_curves_and_they_are_drawn_again(vlm, tmp_path, suite_file, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(rate_curves, "picture", lambda rows, title: seen.append(len(rows)) or picture(rows, title))
    entries = [{"method": "evenly-spaced", "compression": compression} for compression in (2, 4)]
    result, plot = tmp_path / "result.json", tmp_path / "new" / "eval.png"
    words = ["--suite", suite_file(entries), "--json", str(result), "--plot", str(plot)]
    assert evaluate("--model", vlm, *QUICK, *words) == 0
    assert seen == [3]
    with Image.open(plot) as drawn:
        assert drawn.size[0] > 1000
    before = plot.read_bytes()
    plot.unlink()
    assert redraw.main(["--json", str(result), "--plot", str(plot)]) == 0
    assert seen == [3, 3] and plot.read_bytes() == before
    save_picture(picture(ROWS, "title"), tmp_path / "all.svg")
    assert (tmp_path / "all.svg").read_text().startswith("<?xml")


def test_what_is_no_result_is_refused_in_a_line(tmp_path, capsys) -> None:
    (tmp_path / "x.json").write_text('{"rows": []}')
    assert redraw.main(["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]) == 2
    assert "cannot be drawn (KeyError: 'command')" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    assert redraw.main(["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.gif")]) == 2
    assert "a picture's name ends in" in capsys.readouterr().err
