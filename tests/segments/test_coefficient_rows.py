"""Coded rows: where a cell's bytes are, what a code means, and how far it may be from the coefficient."""

import pytest
import torch
from support import slow_decode
from support.builders import LADDER, random_widths

from kvcapsule.segments.bit_packing import GROUP, WIDTHS
from kvcapsule.segments.coefficient_rows import CellLayout, CodedRows, Coding
from kvcapsule.segments.packed_rows import Packed, read_rows
from kvcapsule.segments.segment import storage_bytes

SETS, GROUPS, CHANNELS, ENTRIES = 2, 3, 5, 4
ROWS = GROUPS * GROUP


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_coding(widths: torch.Tensor | None = None, dtype: torch.dtype = torch.float64, heads: int = 1) -> Coding:
    """Steps from 0.1 to 0.3, a mean of about one."""
    widths = random_widths((SETS, GROUPS, CHANNELS), generator()) if widths is None else widths
    sets, groups, channels = widths.shape
    step = 0.1 + 0.2 * torch.rand(widths.shape, generator=generator(1), dtype=torch.float64)
    offset = torch.randn(sets, groups * GROUP, channels, generator=generator(2), dtype=torch.float64)
    return Coding(widths, step.to(dtype), offset.to(dtype), heads)


def coefficients(spread: float, seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (spread * torch.randn(ENTRIES, SETS, ROWS, CHANNELS, generator=generator(seed), dtype=torch.float64)).to(
        dtype
    )


def by_row(cells: torch.Tensor) -> torch.Tensor:
    """[S, G, C] to [S, 8 G, C], one row at a time."""
    return torch.stack([cells[:, row // GROUP] for row in range(cells.shape[1] * GROUP)], dim=1)


def test_layout_by_hand() -> None:
    """Two sets of heads, two groups, two channels: the 8, the 4, both 3s in their order, the 2, the 1; a cell of width
    0 has no bytes."""
    layout = CellLayout(torch.tensor([[[3, 0], [1, 8]], [[2, 3], [0, 4]]], dtype=torch.uint8))
    found = [(kind.width, kind.cells.tolist(), (kind.run.start, kind.run.stop)) for kind in layout.classes]
    assert found == [(8, [3], (0, 8)), (4, [7], (8, 12)), (3, [0, 5], (12, 18)), (2, [4], (18, 20)), (1, [2], (20, 21))]
    assert layout.size == 21


def test_bytes_by_hand() -> None:
    """One set, two groups, two channels; steps of 1 about a mean of 0, so that a coefficient's code is its floor and
    half the levels."""
    coding = Coding(torch.tensor([[[1, 4], [0, 2]]], dtype=torch.uint8), torch.ones(1, 2, 2), torch.zeros(1, 16, 2))
    rows = torch.zeros(1, 1, 16, 2)
    rows[0, 0, :8, 0] = torch.tensor([0.3, -0.3, 5.0, -5.0, 0.9, 0.9, -0.9, -0.9])
    rows[0, 0, :8, 1] = torch.tensor([-8.0, -7.5, -1.0, -0.5, 0.5, 1.5, 6.99, 7.0])
    rows[0, 0, 8:, 0] = 77.0
    rows[0, 0, 8:, 1] = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.9, 0.9, -0.1, -1.1])
    packed = CodedRows.encode(rows, coding)
    assert packed.packed.tolist() == [[0x00, 0x77, 0x98, 0xFE, 0b11_10_01_00, 0b00_01_10_11, 0b0011_0101]]
    read = packed.read(torch.float32)[0, 0]
    assert read[:8, 0].tolist() == [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5, -0.5]
    assert read[:8, 1].tolist() == [-7.5, -7.5, -0.5, -0.5, 0.5, 1.5, 6.5, 7.5]
    assert read[8:, 0].tolist() == [0.0] * 8
    assert read[8:, 1].tolist() == [-1.5, -0.5, 0.5, 1.5, 1.5, 0.5, -0.5, -1.5]


@pytest.mark.parametrize("seed", range(5))
def test_addresses_go_by_width_then_set_group_and_channel(seed: int) -> None:
    widths = torch.tensor(LADDER, dtype=torch.uint8)[torch.randint(0, 6, (3, 4, 7), generator=generator(seed))]
    layout = CellLayout(widths)
    found = {}
    for kind in layout.classes:
        for i, cell in enumerate(kind.cells.tolist()):
            of_set, rest = divmod(cell, 4 * 7)
            found[(of_set, *divmod(rest, 7))] = kind.start + i * kind.width
    assert found == slow_decode.addresses(widths)
    assert [kind.width for kind in layout.classes] == sorted({int(w) for w in widths.unique() if w}, reverse=True)
    assert layout.size == int(widths.sum())


def test_cells_say_where_their_bytes_are() -> None:
    widths = torch.tensor(LADDER, dtype=torch.uint8)[torch.randint(0, 6, (3, 4, 7), generator=generator())]
    cells = random_coding(widths).cells
    for place, byte in slow_decode.addresses(widths).items():
        assert divmod(int(cells[place]), 16) == (byte, int(widths[place]))
    assert torch.equal(cells & 15, widths.to(torch.int32))


@pytest.mark.parametrize("changed", range(GROUP))
def test_a_cell_is_in_its_own_bytes(changed: int) -> None:
    """Changing one coefficient changes bytes of its cell alone."""
    coding, rows = random_coding(), coefficients(0.1)
    before = CodedRows.encode(rows, coding).packed
    for (of_set, group, channel), byte in slow_decode.addresses(coding.widths).items():
        place = (of_set, GROUP * group + changed, channel)
        other = rows.clone()
        other[(1, *place)] = 99.0 if rows[(1, *place)] < coding.offset[place] else -99.0
        entries, bytes_ = (CodedRows.encode(other, coding).packed != before).nonzero(as_tuple=True)
        assert set(entries.tolist()) == {1}
        assert set(bytes_.tolist()) <= set(range(byte, byte + int(coding.widths[of_set, group, channel])))


@pytest.mark.parametrize("width", [0, *WIDTHS])
def test_one_width_throughout(width: int) -> None:
    coding = random_coding(torch.full((SETS, GROUPS, CHANNELS), width, dtype=torch.uint8))
    packed = CodedRows.encode(coefficients(1.0), coding)
    assert packed.packed.shape == (ENTRIES, width * SETS * GROUPS * CHANNELS)
    assert packed.packed.dtype == torch.uint8


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("spread", [0.2, 1.0, 30.0])
def test_read_is_the_slow_decode(spread: float, heads: int) -> None:
    packed = CodedRows.encode(coefficients(spread), random_coding(heads=heads))
    assert isinstance(packed, Packed)
    assert packed.read(torch.float64).shape == (ENTRIES, SETS, ROWS, CHANNELS), (
        "the heads of a set have their rows in common"
    )
    read = read_rows(packed, torch.float64)
    assert read.shape == packed.shape == (ENTRIES, SETS * heads, ROWS, CHANNELS)
    for entry in range(ENTRIES):
        for head in range(SETS * heads):
            torch.testing.assert_close(read[entry, head], slow_decode.coded(packed, entry, head), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
def test_error_is_half_a_step_in_range_and_the_rest_is_clipped(spread: float, dtype: torch.dtype) -> None:
    coding, rows = random_coding(dtype=dtype), coefficients(spread, dtype=dtype)
    read = CodedRows.encode(rows, coding).read(dtype)
    width, step = by_row(coding.widths.to(dtype)), by_row(coding.scale)
    centred, found = rows - coding.offset, read - coding.offset
    coded = (width > 0).expand_as(rows)
    inside = coded & (centred.abs() <= 2 ** (width - 1) * step)
    above, below = coded & ~inside & (centred > 0), coded & ~inside & (centred < 0)
    assert inside.any() and above.any() and below.any() and (~coded).any()
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    assert ((found - centred).abs() <= step / 2 + slack)[inside].all()
    end = ((2**width - 1) / 2 * step).expand_as(rows)
    torch.testing.assert_close(found[above], end[above], rtol=0, atol=slack)
    torch.testing.assert_close(found[below], -end[below], rtol=0, atol=slack)
    assert torch.equal(read[~coded], coding.offset.expand_as(rows)[~coded])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.2, 5.0])
def test_what_was_read_encodes_to_itself(spread: float, dtype: torch.dtype) -> None:
    coding = random_coding(dtype=dtype)
    once = CodedRows.encode(coefficients(spread, dtype=dtype), coding)
    again = CodedRows.encode(once.read(dtype), coding)
    assert torch.equal(again.packed, once.packed)
    assert len(once.packed.unique()) > 20


def test_no_nearer_code_exists() -> None:
    """Of all levels of the cell, the one that is read is the nearest to the coefficient."""
    coding, rows = random_coding(), coefficients(1.0)
    read = CodedRows.encode(rows, coding).read(torch.float64)
    width, step = by_row(coding.widths.double()), by_row(coding.scale)
    for code in range(2**8):
        level = (code - (2**width - 1) / 2) * step + coding.offset
        there = (code < 2**width) & (width > 0)
        assert ((read - rows).abs() <= (level - rows).abs() + 1e-12)[there.expand_as(rows)].all()


def test_a_step_of_zero_reads_the_offset_and_leaves_its_neighbours_alone() -> None:
    """A component that never varied in training."""
    coding, rows = random_coding(), coefficients(0.3)
    step = coding.scale.clone()
    step[1, 2] = 0.0
    rows[:, 1, 2 * GROUP, :] = coding.offset[1, 2 * GROUP]
    silent = CodedRows.encode(rows, Coding(coding.widths, step, coding.offset)).read(torch.float64)
    expected = CodedRows.encode(rows, coding).read(torch.float64)
    expected[:, 1, 2 * GROUP :] = coding.offset[1, 2 * GROUP :]
    torch.testing.assert_close(silent, expected, rtol=0, atol=0)


def test_without_any_bits_the_offset_is_read() -> None:
    coding = random_coding(torch.zeros(SETS, GROUPS, CHANNELS, dtype=torch.uint8))
    packed = CodedRows.encode(coefficients(5.0), coding)
    assert packed.packed.shape == (ENTRIES, 0)
    assert storage_bytes(iter(packed.tensors())) == 0
    assert packed.shape == (ENTRIES, SETS, ROWS, CHANNELS)
    assert torch.equal(packed.read(torch.float64), coding.offset.expand(ENTRIES, -1, -1, -1))
    chosen = packed.select(torch.tensor([2, 2]))
    assert torch.equal(chosen.read(torch.float64), coding.offset.expand(2, -1, -1, -1))


def test_no_entries() -> None:
    packed = CodedRows.encode(coefficients(1.0)[:0], random_coding())
    assert packed.packed.shape == (0, int(packed.coding.widths.sum()))
    assert packed.read(torch.float32).shape == (0, SETS, ROWS, CHANNELS)


def test_bytes_are_the_sum_of_the_widths() -> None:
    packed = CodedRows.encode(coefficients(1.0), random_coding())
    expected = int(packed.coding.widths.sum())
    assert storage_bytes(iter(packed.tensors())) == ENTRIES * expected
    assert storage_bytes(iter(packed.select(torch.tensor([3, 1])).tensors())) == 2 * expected


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_of_a_set_read_the_same_rows(heads: int) -> None:
    """Stored once: neighbouring heads, as many as the set has."""
    alone = CodedRows.encode(coefficients(1.0), random_coding())
    together = CodedRows.encode(coefficients(1.0), random_coding(heads=heads))
    assert torch.equal(together.packed, alone.packed)
    read, expected = read_rows(together, torch.float64), alone.read(torch.float64)
    for head in range(SETS * heads):
        assert torch.equal(read[:, head], expected[:, head // heads])


def test_select_takes_entries_and_shares_the_coding() -> None:
    packed = CodedRows.encode(coefficients(1.0), random_coding(heads=2))
    index = torch.tensor([2, 0, 2])
    chosen = packed.select(index)
    assert chosen.coding is packed.coding
    assert torch.equal(chosen.read(torch.float64), packed.read(torch.float64)[index])
    assert [t.data_ptr() for t in chosen.shared()] == [t.data_ptr() for t in packed.shared()]


def test_what_is_stored_and_what_is_shared() -> None:
    packed = CodedRows.encode(coefficients(1.0), random_coding())
    coding = packed.coding
    assert [id(t) for t in packed.tensors()] == [id(packed.packed)]
    assert [id(t) for t in packed.shared()] == [id(coding.widths), id(coding.scale), id(coding.offset)]


def test_to_moves_codes_and_leaves_the_coding() -> None:
    packed = CodedRows.encode(coefficients(1.0), random_coding(heads=2))
    stayed = packed.to("cpu")
    assert stayed.coding is packed.coding
    assert torch.equal(stayed.read(torch.float64), packed.read(torch.float64))
    moved = packed.to("meta")
    assert {t.device.type for t in moved.tensors()} == {"meta"}
    assert moved.coding is packed.coding
    assert moved.shape == packed.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_read_is_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    packed = CodedRows.encode(coefficients(1.0), random_coding())
    read = packed.read(dtype)
    assert read.dtype == dtype
    torch.testing.assert_close(
        read.double(), packed.read(torch.float64), rtol=0, atol=0 if dtype == torch.float64 else 0.2
    )


def test_the_layout_is_made_once() -> None:
    coding = random_coding()
    assert coding.layout is coding.layout
