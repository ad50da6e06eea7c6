"""Few-bit rows: their codes, worked out by hand, and their bytes."""

import pytest
import torch
from support import slow_decode

from kvcapsule.segments.quantized_rows import BITS, QuantizedRows
from kvcapsule.segments.segment import storage_bytes


def rows(tokens: int, dim: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 2, tokens, dim, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def test_two_bits_by_hand() -> None:
    """-1 .. 5 in steps of 2: codes 0 3 1 2 | 0 of five tokens, four to a byte, the first in the lowest bits."""
    x = torch.tensor([-1.0, 5.0, 1.4, 2.6, -0.9]).view(1, 1, 5, 1)
    packed = QuantizedRows.pack(x, 2)
    assert packed.scale.item() == 2.0
    assert packed.minimum.item() == -1.0
    assert packed.codes.flatten().tolist() == [0b10_01_11_00, 0b00]
    assert packed.read(torch.float32).flatten().tolist() == [-1.0, 5.0, 1.0, 3.0, -1.0]


def test_one_bit_by_hand() -> None:
    """Either end of the channel: codes 0 1 1 0 0 0 0 1 | 1 of nine tokens."""
    x = torch.tensor([2.0, 6.0, 5.0, 3.0, 2.0, 2.5, 3.9, 4.1, 6.0]).view(1, 1, 9, 1)
    packed = QuantizedRows.pack(x, 1)
    assert packed.codes.flatten().tolist() == [0b10000110, 0b1]
    assert packed.read(torch.float32).flatten().tolist() == [2.0, 6.0, 6.0, 2.0, 2.0, 2.0, 2.0, 6.0, 6.0]


def test_three_bits_by_hand() -> None:
    """Codes 0 7 1 6 2 5: their low two bits 0 3 1 2 | 2 1, then their high bits 0 1 0 1 0 1."""
    x = torch.tensor([0.0, 7.0, 1.0, 6.0, 2.0, 5.0]).view(1, 1, 6, 1)
    packed = QuantizedRows.pack(x, 3)
    assert packed.codes.flatten().tolist() == [0b10_01_11_00, 0b01_10, 0b101010]
    assert packed.read(torch.float32).flatten().tolist() == x.flatten().tolist()


def test_four_bits_by_hand() -> None:
    """Two channels with a step each: 0 .. 15 and 0 .. 30."""
    x = torch.tensor([[0.0, 30.0], [15.0, 0.0], [6.6, 9.0]])[None, None]
    packed = QuantizedRows.pack(x, 4)
    assert packed.scale.flatten().tolist() == [1.0, 2.0]
    assert packed.codes[0, 0].tolist() == [[0xF0, 0x07, 0, 0], [0x0F, 0x04, 0, 0]]
    assert packed.read(torch.float32)[0, 0].tolist() == [[0.0, 30.0], [15.0, 0.0], [7.0, 8.0]]


def test_eight_bits_by_hand() -> None:
    x = torch.tensor([-10.0, 245.0, 3.4, 100.0]).view(1, 1, 4, 1)
    packed = QuantizedRows.pack(x, 8)
    assert packed.codes.flatten().tolist() == [0, 255, 13, 110, 0, 0, 0, 0]
    assert packed.read(torch.float32).flatten().tolist() == [-10.0, 245.0, 3.0, 100.0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 49, 64, 65])
def test_error_is_at_most_half_a_step(bits: int, tokens: int) -> None:
    x = rows(tokens)
    packed = QuantizedRows.pack(x, bits)
    read = packed.read(torch.float32)
    assert read.shape == packed.shape == x.shape
    assert ((read - x).abs() <= packed.scale / 2 + 1e-6).all()
    torch.testing.assert_close(read.amin(2), x.amin(2))
    torch.testing.assert_close(read.amax(2), x.amax(2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 49, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(bits: int, tokens: int, dtype: torch.dtype) -> None:
    """Whole bytes for each channel of an entry, and a step and a zero in the dtype of the rows."""
    packed = QuantizedRows.pack(rows(tokens, dtype=dtype), bits)
    held = storage_bytes(iter(packed.tensors()))
    assert held == 3 * 2 * 6 * (-(-tokens // 8) * bits + 2 * dtype.itemsize)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 5, 8, 17])
def test_read_is_the_slow_decode(bits: int, tokens: int) -> None:
    packed = QuantizedRows.pack(rows(tokens, dtype=torch.float64), bits)
    read = packed.read(torch.float64)
    for entry in range(3):
        for head in range(2):
            torch.testing.assert_close(
                read[entry, head], slow_decode.quantized(packed, entry, head), rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 5, 7, 49])
def test_padding_is_of_code_zero(bits: int, tokens: int) -> None:
    """Whatever the channel holds: every token there is has the greatest code but the first."""
    x = torch.full((1, 1, tokens, 1), 9.0)
    x[:, :, 0] = -9.0
    run = QuantizedRows.pack(x, bits).codes.flatten().tolist()
    codes = [
        slow_decode.code(run[group * bits :][:bits], bits, i) for group in range(len(run) // bits) for i in range(8)
    ]
    assert codes == [0] + [2**bits - 1] * (tokens - 1) + [0] * (-tokens % 8)


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits cannot be packed: choose one of 1, 2, 3, 4, 8"):
        QuantizedRows.pack(rows(4), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_channels_without_width(bits: int, dtype: torch.dtype) -> None:
    """A constant channel, and one whose step half precision cannot hold, come back as they are."""
    x = rows(9, dtype=dtype)
    x[..., 0] = 3.0
    x[..., 1] = torch.arange(9) * 6e-8
    packed = QuantizedRows.pack(x, bits)
    read = packed.read(torch.float32)
    assert (packed.codes[:, :, 0] == 0).all()
    assert (read[..., 0] == 3.0).all()
    torch.testing.assert_close(read[..., 1], x[..., 1].float(), rtol=0, atol=6e-7)


def test_select_and_to() -> None:
    packed = QuantizedRows.pack(rows(5), 4)
    index = torch.tensor([2, 0, 2])
    torch.testing.assert_close(
        packed.select(index).read(torch.float32), packed.read(torch.float32)[index], rtol=0, atol=0
    )
    torch.testing.assert_close(packed.to("cpu").read(torch.float32), packed.read(torch.float32), rtol=0, atol=0)
    assert packed.read(torch.float64).dtype == torch.float64
