"""Mixed-width rows: what is read is the nearest number of each channel's grid, in the bits that the form says."""

import copy
from itertools import pairwise

import pytest
import torch

from kvcapsule.segments.mixed_width_rows import MixedWidthRows, WidthForm
from kvcapsule.segments.packed_rows import stored_tensors
from kvcapsule.segments.storable_rows import join_rows

WIDTHS = ((7, 4, 0, 3, 2, 1), (5, 0, 6, 1, 0, 0))
HEADS, CHANNELS = 2, 6


def form() -> WidthForm:
    generator = torch.Generator().manual_seed(1)
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)
    unit = 4 * torch.logspace(-1, 1, CHANNELS) * (0.7 + 0.6 * torch.rand(widths.shape, generator=generator))
    centre = -unit / 2 + 0.1 * torch.randn(unit.shape, generator=generator)
    return WidthForm(widths, unit / (2.0**widths - 1).clamp_min(1), centre)


def rows(entries: int, count: int, seed: int = 0) -> torch.Tensor:
    """Channels of very different sizes."""
    drawn = torch.randn(entries, HEADS, count, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.logspace(-1, 1, CHANNELS)


@pytest.mark.parametrize("count", [1, 7, 8, 21])
def test_numbers_are_off_by_little_more_than_their_bits_allow(count: int) -> None:
    """A grid of the best of all scales and minima has half a step of error at most; those of a byte are a quarter and a
    twelfth of the range coarser."""
    x, of = rows(3, count), form()
    read = MixedWidthRows.encode(x, of).read(torch.float32)
    lost = read - x
    levels = (2.0**of.widths - 1)[:, None]
    far = (x.amin(2, keepdim=True) - of.centre[:, None]).abs() * 6 / 7
    reach = torch.maximum(torch.maximum(x.amax(2, keepdim=True) - x.amin(2, keepdim=True), far), of.unit[:, None] / 4)
    bound = reach * 2 ** (1 / 3) * (0.5 / levels + 1 / 6)
    coded = (of.widths > 0)[:, None]
    assert bool((lost.square().mean(2, keepdim=True) <= bound.square())[coded.expand(3, -1, -1, -1)].all())
    assert bool((coded | (read == of.centre[:, None])).all()), "a channel without bits is its centre"


def test_an_outlier_is_clipped_where_that_is_nearer_to_the_other_rows() -> None:
    x = rows(4, 64)
    x[:, :, 0, 1] *= 4
    of = WidthForm(torch.full((HEADS, CHANNELS), 2, dtype=torch.uint8), form().unit, form().centre)
    read = MixedWidthRows.encode(x, of).read(torch.float32)
    whole = x.amax(2, keepdim=True) - x.amin(2, keepdim=True)
    evenly = ((x - x.amin(2, keepdim=True)) / whole * 3).round() / 3 * whole + x.amin(2, keepdim=True)
    assert float((read - x)[..., 1].square().mean()) < 0.8 * float((evenly - x)[..., 1].square().mean())


def test_more_bits_are_nearer() -> None:
    x, errors = rows(5, 40), []
    for bits in range(8):
        widths = torch.full((HEADS, CHANNELS), bits, dtype=torch.uint8)
        unit = 5 * torch.logspace(-1, 1, CHANNELS).expand(HEADS, -1) / max(1, 2**bits - 1)
        of = WidthForm(widths, unit, torch.zeros(HEADS, CHANNELS) - (unit * (2**bits - 1) / 2))
        errors.append(float((MixedWidthRows.encode(x, of).read(torch.float32) - x).square().mean()))
    assert all(after < 0.55 * before for before, after in pairwise(errors))


def test_a_row_is_its_codes_in_whole_bytes_and_a_channel_with_bits_a_byte() -> None:
    """By hand: 17 bits are three bytes a row, 12 are two; five channels of one head have bits, three of the other."""
    packed = MixedWidthRows.encode(rows(3, 21), form())
    sizes = [t.numel() * t.element_size() for t in stored_tensors(packed)]
    assert sizes == [3 * 21 * (3 + 2), 3 * (5 + 3)]


def test_numbers_by_hand() -> None:
    """Unit 0.5, centre -1, 3 bits: the byte 16 * 5 + 9 is a scale of 2^(3 / 3) units and a minimum of half the range of
    7 scales below the centre. Codes 5 and 6 beside one another are the bits 110101, from the lowest to the left."""
    of = WidthForm(torch.tensor([[3, 3]], dtype=torch.uint8), torch.full((1, 2), 0.5), torch.full((1, 2), -1.0))
    side = torch.full((1, 1, 2), 16 * 5 + 9, dtype=torch.uint8)
    packed = MixedWidthRows.of_codes(torch.tensor([[[[5, 6], [0, 7]]]], dtype=torch.uint8), side, of)
    assert packed.packed.tolist() == [[5 + (6 << 3), 7 << 3]]
    expected = torch.tensor([[5.0, 6.0], [0.0, 7.0]]) - 1 - 7 / 2
    torch.testing.assert_close(packed.read(torch.float32)[0, 0], expected, rtol=0, atol=1e-6)


def test_all_codes_of_all_widths_are_read_again() -> None:
    """Side by side, so that codes begin at every bit and some lie in two bytes."""
    widths = torch.tensor([[7, 1, 6, 2, 5, 3, 4, 0, 7, 7], [1, 1, 1, 7, 0, 6, 6, 5, 5, 3]], dtype=torch.uint8)
    codes = (
        torch.randint(0, 128, (2, 2, 300, 10), generator=torch.Generator().manual_seed(3))
        % (1 << widths.long())[:, None]
    )
    of = WidthForm(widths, torch.ones(2, 10), torch.zeros(2, 10))
    packed = MixedWidthRows.of_codes(codes.to(torch.uint8), torch.zeros(2, 2, 10, dtype=torch.uint8), of)
    assert torch.equal(packed.codes().long(), codes)


def test_entries_are_selected_joined_and_copied_alike() -> None:
    packed = MixedWidthRows.encode(rows(4, 9), form())
    read = packed.read(torch.float32)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(packed.select(index).read(torch.float32), read[index])
    assert torch.equal(join_rows([packed, packed.select(index)]).read(torch.float32), torch.cat([read, read[index]]))  # type: ignore[union-attr]
    copied = copy.deepcopy(packed)
    assert copied.form is packed.form and copied.packed.data_ptr() != packed.packed.data_ptr()
    assert torch.equal(copied.to("cpu").read(torch.float32), read)


def test_equal_numbers_and_half_precision_stay_finite() -> None:
    for x in (torch.zeros(1, HEADS, 8, 6), torch.full((1, HEADS, 8, 6), 3.0), rows(1, 8).half()):
        read = MixedWidthRows.encode(x, form()).read(x.dtype)
        assert bool(read.isfinite().all()) and read.dtype == x.dtype
