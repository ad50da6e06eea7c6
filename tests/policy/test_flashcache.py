"""FlashCache: the filter, the outliers and the budgets worked out by hand."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.prefills import mixed, places, run, tokens

from kvcapsule.policy import FlashCache
from kvcapsule.policy.flashcache import beyond_filter, cosines

CPU = torch.device("cpu")


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[None, :, None]


def test_one_frequency_is_the_mean() -> None:
    """1 1 1 5: 1 away from the mean of 2, and 3; the energy is 28."""
    assert beyond_filter(column(1, 1, 1, 5), 0.25).tolist() == pytest.approx([1 / 28, 1 / 28, 1 / 28, 9 / 28])


def test_two_frequencies_by_hand() -> None:
    """The second cosine of three tokens is 1 0 -1 over the root of 2: of 0 3 0 it takes nothing, of 3 0 0 half."""
    assert beyond_filter(column(0, 3, 0), 2 / 3).tolist() == pytest.approx([1 / 9, 4 / 9, 1 / 9])
    # 3 0 0: mean 1 1 1, cosine 1.5 0 -1.5; left over 0.5 -1 0.5.
    assert beyond_filter(column(3, 0, 0), 2 / 3).tolist() == pytest.approx([0.25 / 9, 1 / 9, 0.25 / 9])


def test_the_cosines_are_orthonormal() -> None:
    basis = cosines(12, 1.0, torch.float64, CPU)
    torch.testing.assert_close(basis @ basis.T, torch.eye(12, dtype=torch.float64))
    assert float(basis[5, 3]) == pytest.approx(math.sqrt(2 / 12) * math.cos(math.pi / 12 * 3.5 * 5))
    assert cosines(12, 0.3, torch.float64, CPU).shape == (4, 12)
    assert cosines(3, 0.1, torch.float64, CPU).shape == (1, 3), "one passes at least"


def test_what_passes_the_filter_is_no_outlier() -> None:
    smooth = 7 * cosines(40, 0.1, torch.float64, CPU)[3][None, :, None]
    assert float(beyond_filter(smooth, 0.1).max()) < 1e-20
    spike = smooth.clone()
    spike[0, 23] += 1
    assert int(beyond_filter(spike, 0.1).argmax()) == 23
    assert beyond_filter(torch.zeros(1, 5, 2), 0.5).tolist() == [0.0] * 5


def test_layer_budgets_by_hand() -> None:
    """A fifth of ten tokens in two layers, in shares of 1 to 3; what a layer cannot take goes to the other."""
    assert FlashCache(0.2).counts([0.1, 0.3], 10) == [1, 3]
    assert FlashCache(0.75).counts([0.1, 0.9], 10) == [5, 10]
    assert FlashCache(0.5).counts([0.0, 0.0], 10) == [5, 5]
    assert FlashCache(1.0).counts([0.1, 0.9], 10) == [10, 10]


def test_the_greatest_outliers_stay() -> None:
    """Of all images of a row together; keys and values count alike, whatever their units."""
    layers = [replace(of, values=1000 * of.values) for of in mixed()]
    stored = run(FlashCache(0.3, passed=0.2), layers)
    for row in (0, 1, 3):
        images = [s for s in layers[0].spans if s.row == row]
        outlying: list[dict[int, float]] = []
        for of in layers:
            outlying.append({})
            for span in images:
                part = slice(span.start, span.start + span.length)
                both = [beyond_filter(x[row, :, part], 0.2) for x in (of.keys, of.values)]
                outlying[-1].update({span.start + i: float(both[0][i] + both[1][i]) for i in range(span.length)})
        counts = FlashCache(0.3).counts([sum(o.values()) for o in outlying], len(outlying[0]))
        for (visual, text), o, count in zip(stored, outlying, counts, strict=True):
            best = sorted(sorted(o, key=lambda j: -o[j])[:count])
            assert [[round(j / 1000) for j in head] for head in places(visual, row)] == [best, best]
            assert len(places(text, row)[0]) == int(layers[0].valid[row].sum()) - len(o)


def test_a_spike_in_the_values_alone_is_kept() -> None:
    of = tokens([(0, 5, 50)], [0], 60)
    of.keys[:] = 1
    of.values[:] = 1
    of.values[..., 0] = 0.001
    of.values[0, 1, 31, 4] = 3
    visual, _ = FlashCache(0.02).compress(of)
    (segment,) = visual
    assert isinstance(segment.values, torch.Tensor) and float(segment.values[0, 1, 0, 4]) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlashCache(0.0), "retention ratio 0.0 is outside"),
        (lambda: FlashCache(0.5, passed=0.0), "share of frequencies that pass 0.0 is outside"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
