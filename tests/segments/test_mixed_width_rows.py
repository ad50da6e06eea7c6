"""Mixed-width rows: what is read is the nearest number of each channel's grid, in the bytes that the form says."""

import copy

import pytest
import torch

from kvcapsule.segments.mixed_width_rows import MixedWidthRows, WidthForm
from kvcapsule.segments.segment import stored
from kvcapsule.segments.storable_rows import join_rows

WIDTHS = (8, 4, 4, 3, 2, 1)
HEADS = 2


def form(*widths: int) -> WidthForm:
    generator = torch.Generator().manual_seed(1)
    unit = 0.05 + torch.rand(HEADS, len(widths), generator=generator)
    return WidthForm(torch.tensor(widths, dtype=torch.uint8), unit, torch.randn(unit.shape, generator=generator))


def rows(entries: int, count: int, channels: int, seed: int = 0) -> torch.Tensor:
    """With an outlier, and channels of very different sizes."""
    drawn = torch.randn(entries, HEADS, count, channels, generator=torch.Generator().manual_seed(seed))
    drawn[0, 0, 0] *= 12
    return drawn * torch.logspace(-1, 1, channels)


@pytest.mark.parametrize("count", [1, 7, 8, 21])
def test_numbers_are_off_by_half_a_step_on_average_and_outliers_are_kept_where_that_is_nearer(count: int) -> None:
    x = rows(3, count, len(WIDTHS))
    of = form(*WIDTHS)
    packed = MixedWidthRows.encode(x, of)
    levels = 2.0 ** torch.tensor(WIDTHS) - 1
    low = x.amin(2, keepdim=True)
    reach = torch.maximum(x.amax(2, keepdim=True) - low, (low - of.centre[:, None]).abs() * 32 / 127)
    reach = torch.maximum(reach, of.unit[:, None] * levels / 256)
    # Scales are rounded up by up to 2^(1 / 16), minima to a 32nd of the range.
    bound = reach * 2 ** (1 / 16) * (0.5 / levels + 1 / 64)
    lost = packed.read(torch.float32) - x
    assert packed.shape == x.shape and bool((lost.square().mean(2, keepdim=True) <= bound.square()).all())
    # An outlier among seven others is a large part of the error, and 8 bits have room for all.
    assert bool((lost[..., 0].abs() <= bound[..., 0]).all())


def test_with_few_bits_a_grid_over_the_inner_range_is_nearer() -> None:
    x = torch.randn(4, HEADS, 64, 1, generator=torch.Generator().manual_seed(2))
    of = form(1)
    error = (MixedWidthRows.encode(x, of).read(torch.float32) - x).square().mean()
    whole = of.grid(of._covering(x.amin(2), x.amax(2)), torch.float32)
    assert float(error) < 0.5 < float((whole.values(whole.codes(x)) - x).square().mean())


def test_the_bytes_are_the_codes_and_two_a_channel() -> None:
    """By hand: 21 rows are three groups of eight; a group takes the sum of the widths in bytes."""
    packed = MixedWidthRows.encode(rows(3, 21, len(WIDTHS)), form(*WIDTHS))
    sizes = [t.numel() * t.element_size() for t in stored(packed)]
    assert sizes == [3 * HEADS * 3 * sum(WIDTHS), 3 * HEADS * 2 * len(WIDTHS)]


def test_a_number_by_hand() -> None:
    """Unit 0.5, centre -1, 3 bits: the bytes 144 and 112 are a scale of 2^(16 / 16) units and a minimum of half the
    range of 7 scales below the centre."""
    of = WidthForm(torch.tensor([3], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[-1.0]]))
    codes = torch.arange(8, dtype=torch.uint8).view(1, 1, 8, 1)
    packed = MixedWidthRows.of_codes(codes, torch.tensor([[[[144], [112]]]], dtype=torch.uint8), of)
    expected = -1.0 - 7 / 2 + torch.arange(8.0)
    torch.testing.assert_close(packed.read(torch.float32)[0, 0, :, 0], expected, rtol=0, atol=1e-6)


def test_entries_are_selected_joined_and_copied_alike() -> None:
    x = rows(4, 9, len(WIDTHS))
    packed = MixedWidthRows.encode(x, form(*WIDTHS))
    read = packed.read(torch.float32)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(packed.select(index).read(torch.float32), read[index])
    assert torch.equal(join_rows([packed, packed.select(index)]).read(torch.float32), torch.cat([read, read[index]]))  # type: ignore[union-attr]
    copied = copy.deepcopy(packed)
    assert copied.form is packed.form and copied.packed.data_ptr() != packed.packed.data_ptr()
    assert torch.equal(copied.to("cpu").read(torch.float32), read)


def test_equal_numbers_and_half_precision_stay_finite() -> None:
    for x in (torch.zeros(1, HEADS, 8, 6), torch.full((1, HEADS, 8, 6), 3.0), rows(1, 8, 6).half()):
        read = MixedWidthRows.encode(x, form(*WIDTHS)).read(x.dtype)
        assert bool(read.isfinite().all()) and read.dtype == x.dtype
