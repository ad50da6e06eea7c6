"""Rows and bits of coded compact capsules: widths that follow variances, and a budget that is shared by measured
errors."""

from itertools import product

import pytest
import torch
from support.builders import rand

from kvcapsule.codec.bit_allocation import DISTORTION
from kvcapsule.training.families.coded_axes import Grids, RowMoments
from kvcapsule.training.families.coded_search import Candidate, PartShape, allocate_widths, choose


def candidate(size: int, error: float) -> Candidate:
    shape = PartShape(torch.tensor([4], dtype=torch.uint8))
    return Candidate(8, shape, shape, size, error)


def test_channels_with_more_variance_have_more_bits_within_the_bytes() -> None:
    variance = torch.logspace(2, -4, 16)
    sizes = []
    for bits in (0.5, 1.0, 2.0, 4.0):
        shape = allocate_widths(variance, variance, bits, 32)
        sizes.append(shape.head_bytes(32))
        widths = shape.widths.tolist()
        assert widths == sorted(widths, reverse=True) and sizes[-1] <= 4 * bits * 16
    assert sizes == sorted(sizes)


def test_widths_are_near_the_best_of_all() -> None:
    """Against every way to give three channels their widths, at the same bytes."""
    energy, variance, rows = torch.tensor([9.0, 4.0, 0.5]), torch.tensor([6.0, 4.0, 0.3]), 40
    shape = allocate_widths(energy, variance, 3.0, rows)

    def error(widths: tuple[int, ...]) -> float:
        coded = zip(energy.tolist(), variance.tolist(), widths, strict=True)
        return sum(v * DISTORTION[w] if w else e for e, v, w in coded)

    def size(widths: tuple[int, ...]) -> int:
        return 5 * sum(widths) + 2 * sum(w > 0 for w in widths)

    best = min(error(w) for w in product(DISTORTION, repeat=3) if size(w) <= 5 * 9)
    widths = tuple(shape.widths.tolist())
    assert error(widths + (0,) * (3 - len(widths))) <= 1.3 * best


def test_a_budget_is_spent_where_it_saves_most() -> None:
    """By hand: the second layer gains 6 for 10 bytes, the first 1."""
    layers = [[candidate(10, 2.0), candidate(20, 1.0)], [candidate(10, 8.0), candidate(20, 2.0), candidate(30, 1.9)]]
    assert [c.bytes for c in choose(layers, 20)] == [10, 10]
    assert [c.bytes for c in choose(layers, 30)] == [10, 20]
    assert [c.bytes for c in choose(layers, 40)] == [20, 20]
    assert [c.bytes for c in choose(layers, 1000)] == [20, 30]
    with pytest.raises(ValueError, match="20 bytes is the least"):
        choose(layers, 19)


def test_axes_rebuild_rows_and_measure_them_in_the_metric() -> None:
    """All axes together are the rows again; a coefficient's square is what it adds to x^T metric x."""
    rows, root = rand(6, 2, 9, 5, seed=1), rand(2, 5, 5, seed=2)
    metric = root @ root.transpose(1, 2)
    moments = RowMoments(2, 5)
    moments.add(rows[:4])
    moments.add(rows[4:])
    axes = moments.axes(metric)
    coefficients = rows @ axes.into
    torch.testing.assert_close(coefficients @ axes.out.transpose(1, 2), rows)
    lengths = torch.einsum("ehmd,hdf,ehmf->ehm", rows, metric, rows)
    torch.testing.assert_close(coefficients.square().sum(-1), lengths, rtol=0.02, atol=0.01)
    torch.testing.assert_close(axes.energy, coefficients.square().mean((0, 1, 2)))
    spread = coefficients - coefficients.mean(2, keepdim=True)
    torch.testing.assert_close(axes.variance, spread.square().mean((0, 1, 2)))
    assert bool((axes.energy.diff() <= 0).all())

    grids = Grids(2, 5)
    grids.add(coefficients)
    coding = axes.coding(torch.tensor([4, 2, 1], dtype=torch.uint8), grids)
    ranges = (coefficients.amax(2) - coefficients.amin(2)).log().mean(0).exp()[:, :3]
    torch.testing.assert_close(coding.form.unit.double(), ranges / torch.tensor([15.0, 3.0, 1.0]), rtol=1e-5, atol=0)
    assert coding.into.shape == coding.out.shape == (2, 5, 3)
