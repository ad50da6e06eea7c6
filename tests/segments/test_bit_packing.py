"""Eight codes of b bits in b bytes: worked out by hand, and there and back for every width."""

import pytest
import torch
from support import slow_decode

from kvcapsule.segments.bit_packing import GROUP, WIDTHS, pack, unpack

BY_HAND = {
    1: ([1, 0, 1, 1, 0, 0, 1, 0], [0b0_1_0_0_1_1_0_1]),
    2: ([0, 1, 2, 3, 3, 2, 1, 0], [0b11_10_01_00, 0b00_01_10_11]),
    3: ([0, 1, 2, 3, 4, 5, 6, 7], [0b11_10_01_00, 0b11_10_01_00, 0b1_1_1_1_0_0_0_0]),
    4: ([1, 2, 0, 15, 9, 8, 7, 0], [0x21, 0xF0, 0x89, 0x07]),
    8: ([0, 1, 2, 127, 128, 129, 254, 255], [0, 1, 2, 127, 128, 129, 254, 255]),
}


def codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, (*shape, GROUP), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_every_width_is_worked_out() -> None:
    assert tuple(BY_HAND) == WIDTHS


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_by_hand(bits: int) -> None:
    eight, packed = BY_HAND[bits]
    assert pack(torch.tensor(eight, dtype=torch.uint8), bits).tolist() == packed
    assert unpack(torch.tensor(packed, dtype=torch.uint8), bits).tolist() == eight


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 2, 5), (0,), (2, 0, 3)])
def test_there_and_back(bits: int, shape: tuple[int, ...]) -> None:
    eight = codes(bits, *shape)
    before = eight.clone()
    packed = pack(eight, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, bits)
    assert torch.equal(unpack(packed, bits), eight)
    assert torch.equal(eight, before)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_in_every_place(bits: int) -> None:
    """Alone among zeros, and alone among the greatest code: a code touches no bit of its neighbours."""
    every = torch.arange(2**bits, dtype=torch.uint8)
    for background in (0, 2**bits - 1):
        eight = torch.full((GROUP, 2**bits, GROUP), background, dtype=torch.uint8)
        for place in range(GROUP):
            eight[place, :, place] = every
        assert torch.equal(unpack(pack(eight, bits), bits), eight)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_is_a_code(bits: int) -> None:
    """No bit is spare: any bytes are the bytes of the codes that they unpack to."""
    packed = torch.randint(0, 256, (200, bits), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    eight = unpack(packed, bits)
    assert int(eight.max()) < 2**bits
    assert torch.equal(pack(eight, bits), packed)
    assert eight.tolist() == [[slow_decode.code(run, bits, i) for i in range(GROUP)] for run in packed.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
def test_strides_do_not_matter(bits: int) -> None:
    eight = codes(bits, 6, 4)
    turned = eight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    assert torch.equal(pack(turned, bits), pack(eight, bits))
    packed = pack(eight, bits)
    apart = packed.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(unpack(apart, bits), eight)
