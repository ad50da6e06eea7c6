"""Rows and bits of coded compact capsules: widths that follow variances, and a budget that is shared by measured
errors."""

from itertools import product

import pytest
import torch
from support.builders import rand

from kvcapsule.training.families.coded_axes import RowSums
from kvcapsule.training.families.coded_search import _UNIFORM, Candidates, allocate_widths, choose, head_bytes


def candidates(*ways: tuple[int, float], heads: int = 1) -> Candidates:
    """Ways of so many bytes and such an error, the same for all heads."""
    widths = torch.zeros(len(ways), heads, 4, dtype=torch.uint8)
    size, error = torch.tensor(ways, dtype=torch.float64).T
    made = Candidates.of(8, widths, widths[:1], error[:, None, None].expand(-1, 1, heads))
    return made._replace(bytes=size[:, None, None].expand(-1, 1, heads))


def test_channels_with_more_variance_have_more_bits_within_the_bytes() -> None:
    variance = torch.logspace(2, -4, 16)[None]
    sizes = []
    for bits in (0.5, 1.0, 2.0, 4.0):
        widths = allocate_widths(variance, variance, bits, 32)
        sizes.append(int(32 * widths.sum() + 8 * (widths > 0).sum()))
        assert widths[0].tolist() == sorted(widths[0].tolist(), reverse=True) and sizes[-1] <= 32 * bits * 16
    assert sizes == sorted(sizes)


def test_widths_are_near_the_best_of_all() -> None:
    """Against every way to give three channels their widths, at the same bits; each head for itself."""
    energy, variance, rows = torch.tensor([9.0, 4.0, 0.5]), torch.tensor([6.0, 4.0, 0.3]), 40
    widths = allocate_widths(
        torch.stack([energy, energy.flip(0)]), torch.stack([variance, variance.flip(0)]), 3.0, rows
    )
    assert torch.equal(widths[1], widths[0].flip(0))

    def error(of: tuple[int, ...]) -> float:
        coded = zip(energy.tolist(), variance.tolist(), of, strict=True)
        return sum(v * _UNIFORM[w] if w else e for e, v, w in coded)

    def size(of: tuple[int, ...]) -> int:
        return rows * sum(of) + 8 * sum(w > 0 for w in of)

    best = min(error(w) for w in product(range(8), repeat=3) if size(w) <= rows * 9)
    assert size(tuple(widths[0].tolist())) <= rows * 9 and error(tuple(widths[0].tolist())) <= 1.3 * best


def test_bytes_of_a_head_by_hand() -> None:
    """11 bits are two bytes a row; three channels have a byte each, then two."""
    widths = torch.tensor([[7, 0, 3, 1], [0, 0, 4, 4]], dtype=torch.uint8)
    assert head_bytes(widths, 21).tolist() == [21 * 2 + 3, 21 + 2]
    made = Candidates.of(21, widths[None], widths[None], torch.zeros(1, 1, 2))
    assert made.bytes.tolist() == [[[2 * 45 + 21, 2 * 23 + 21]]]


def test_a_budget_is_spent_where_it_saves_most() -> None:
    """By hand: the second layer gains 6 for 10 bytes, the first 1."""
    layers = [[candidates((10, 2.0), (20, 1.0))], [candidates((10, 8.0)), candidates((20, 2.0), (30, 1.9))]]
    assert [c.bytes for c in choose(layers, 20)] == [10, 10]
    assert [c.bytes for c in choose(layers, 30)] == [10, 20]
    assert [c.bytes for c in choose(layers, 40)] == [20, 20]
    assert [c.bytes for c in choose(layers, 1000)] == [20, 30]
    with pytest.raises(ValueError, match="20 bytes is the least"):
        choose(layers, 19)


def test_each_head_has_its_own_bits() -> None:
    """The first head gains little by more bytes, the second much: it alone gets them."""
    both = candidates((10, 8.0), (20, 1.0), heads=2)
    error = both.error.clone()
    error[0, 0, 0] = 1.1
    keys = torch.tensor([1, 3], dtype=torch.uint8)[:, None, None].expand(-1, 2, 4)
    (chosen,) = choose([[both._replace(error=error, keys=keys)]], 30)
    assert chosen.bytes == 30 and chosen.keys.tolist() == [[1] * 4, [3] * 4]
    assert chosen.error == pytest.approx(2.1)


def test_axes_hold_the_energy_and_channels_are_described_by_hand() -> None:
    rows = rand(6, 2, 9, 5, seed=1)
    rows[..., 0] += 3
    sums = RowSums(2, 5)
    sums.add(rows[:4])
    sums.add(rows[4:])
    axes = sums.axes()
    torch.testing.assert_close(axes.transpose(1, 2) @ axes, torch.eye(5, dtype=axes.dtype).expand(2, -1, -1))
    energy = (rows @ axes).square().mean((0, 2))
    assert bool((energy.diff(dim=1) <= 0).all())
    greatest = torch.linalg.eigvalsh(torch.einsum("ehmd,ehmf->hdf", rows, rows) / 54)[:, -1]
    torch.testing.assert_close(energy[:, 0], greatest)

    found = sums.channels()
    torch.testing.assert_close(found.mean, rows.mean((0, 2)))
    torch.testing.assert_close(found.energy, rows.var((0, 2), unbiased=False))
    torch.testing.assert_close(found.variance, rows.var(2, unbiased=False).mean(0))
    torch.testing.assert_close(found.low, rows.amin(2).mean(0))
    form = found.form(torch.tensor([[4, 2, 1, 0, 7]] * 2, dtype=torch.uint8))
    ranges = (rows.amax(2) - rows.amin(2)).log().mean(0).exp()
    torch.testing.assert_close(
        form.unit.double(), ranges / torch.tensor([15.0, 3.0, 1.0, 1.0, 127.0]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(form.centre[:, 3].double(), found.mean[:, 3], rtol=1e-5, atol=0)
    torch.testing.assert_close(form.centre[:, 0].double(), found.low[:, 0], rtol=1e-5, atol=0)
