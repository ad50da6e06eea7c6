"""Mean axes: a code gives the mean tile back where it has no bits, and nothing that is coded changes."""

import pytest
import torch

from kvcapsule.segments.bit_packing import GROUP
from kvcapsule.training.families.mean_axes import LOST, used, with_means
from kvcapsule.training.second_moments import Bases

SETS, TILE, WIDTH = 2, 20, 12


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def bases() -> Bases:
    """Orthonormal along tokens, and of any metric along channels."""
    into = rand(SETS, WIDTH, WIDTH, seed=1)
    return Bases(torch.linalg.qr(rand(SETS, TILE, TILE)).Q, into, torch.linalg.inv(into).transpose(1, 2))


@pytest.fixture
def widths() -> torch.Tensor:
    """Bits in the first row group and the first five channels."""
    found = torch.zeros(SETS, 3, WIDTH, dtype=torch.uint8)
    found[:, 0, :5] = 2
    return found


def decoded(bases: Bases, coefficients: torch.Tensor, rows: int, channels: int) -> torch.Tensor:
    rows = min(rows, TILE)
    return (
        bases.tokens[:, :rows].transpose(1, 2)
        @ coefficients[:, :rows, :channels]
        @ bases.channels_out[:, :, :channels].transpose(1, 2)
    )


CELLS = torch.ones(SETS, 3, WIDTH, dtype=torch.float64)


def test_a_mean_of_low_rank_takes_few_axes(bases: Bases, widths: torch.Tensor) -> None:
    """A constant in the last channels, as a key's bias, in another pattern along the tokens for each."""
    mean = torch.zeros(SETS, TILE, WIDTH, dtype=torch.float64)
    mean[:, :, -2:] = 100 * rand(SETS, TILE, 2, seed=2)
    held = with_means(bases, mean, CELLS, widths)
    assert used(widths) == (8, 5)
    assert (held.channels, held.rows) == (7, 16)
    torch.testing.assert_close(
        decoded(held.bases, held.mean, held.rows, held.channels), decoded(bases, mean, TILE, WIDTH), rtol=0, atol=1e-8
    )
    lost = decoded(bases, mean, *used(widths)) - decoded(bases, mean, TILE, WIDTH)
    assert lost.square().sum() > 1e4


def test_no_more_than_the_bound_is_lost(bases: Bases, widths: torch.Tensor) -> None:
    mean = 0.3 * rand(SETS, TILE, WIDTH, seed=3)
    held = with_means(bases, mean, CELLS, widths)
    assert 5 < held.channels < WIDTH or 8 < held.rows < 24
    expected = float(CELLS.sum()) - widths.gt(0).sum() * (1 - 0.1188)
    lost = held.mean.clone()
    lost[:, : held.rows, : held.channels] = 0
    assert lost.square().sum() <= 2 * LOST * expected
    assert held.rows % GROUP == 0
    torch.testing.assert_close(held.mean.square().sum(), mean.square().sum())


def test_what_is_coded_does_not_change(bases: Bases, widths: torch.Tensor) -> None:
    held = with_means(bases, 5 * rand(SETS, TILE, WIDTH, seed=4), CELLS, widths)
    assert torch.equal(held.bases.tokens[:, :8], bases.tokens[:, :8])
    for ours, theirs in zip(held.bases[1:], bases[1:], strict=True):
        assert torch.equal(ours[:, :, :5], theirs[:, :, :5])
    x = rand(3, SETS, TILE, WIDTH, seed=5)
    coefficients = held.bases.coefficients(x)
    back = held.bases.tokens.transpose(1, 2) @ coefficients @ held.bases.channels_out.transpose(1, 2)
    torch.testing.assert_close(back, x)


def test_nothing_is_added_without_a_mean(bases: Bases, widths: torch.Tensor) -> None:
    held = with_means(bases, torch.zeros(SETS, TILE, WIDTH, dtype=torch.float64), CELLS, widths)
    assert (held.rows, held.channels) == (8, 5)


def test_most_channels(bases: Bases, widths: torch.Tensor) -> None:
    mean = 100 * rand(SETS, TILE, WIDTH, seed=6)
    assert with_means(bases, mean, CELLS, widths).channels == WIDTH
    assert with_means(bases, mean, CELLS, widths, most=6).channels == 6
    assert with_means(bases, mean, CELLS, widths, most=3).channels == 5
