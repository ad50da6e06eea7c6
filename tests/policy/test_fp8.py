"""fp8: numbers of e4m3 by hand, and the bytes of both kinds of scale."""

import re

import pytest
import torch
from support.builders import rand
from support.prefills import tokens

from kvcapsule.kernels.reference import attend
from kvcapsule.policy import Fp8, Full
from kvcapsule.segments.float8_rows import Float8Rows
from kvcapsule.segments.segment import storage_bytes


@pytest.mark.parametrize(
    ("number", "read"),
    [
        # Eighths of the power of two below; the least step is 2^-9.
        (1.06, 1.0),
        (1.07, 1.125),
        (300.0, 288.0),
        (0.0012, 2**-9),
        (0.0009, 0.0),
        # Beyond its range it is the greatest, not NaN.
        (460.0, 448.0),
        (-1e6, -448.0),
    ],
)
def test_numbers_by_hand(number: float, read: float) -> None:
    rows = Float8Rows.pack(torch.tensor([[[[number, 1.0]]]]), scaled=False)
    assert rows.read(torch.float64).flatten().tolist() == [read, 1.0]


def test_scales_by_hand() -> None:
    """The greatest of a token is 448 units, another counted in them: 448 / 3 = 149.3 is rounded to 144."""
    rows = Float8Rows.pack(torch.tensor([[[[9000.0, -3000.0], [0.3, 0.1], [0.0, 0.0]]]]), scaled=True)
    assert rows.scale is not None
    assert rows.scale.flatten().tolist() == pytest.approx([9000 / 448, 0.3 / 448, 1e-12 / 448])
    expected = [9000.0, -9000 * 144 / 448, 0.3, 0.3 * 144 / 448, 0.0, 0.0]
    assert rows.read(torch.float32).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("scales", "row"), [("none", 8), ("token-head", 8 + 4)])
def test_bytes_and_attention(scales: str, row: int) -> None:
    of = tokens([(0, 2, 60), (1, 9, 31)], [0, 4], 64)
    of.values[..., 0] /= 64
    ours, raw = Fp8(scales).compress(of), Full().compress(of)
    stored = [t for s in ours.visual for t in s.entry_tensors() if t is not s.owner]
    # One segment for each row: of 60 and 31 tokens, one would be padded by half.
    assert storage_bytes(iter(stored)) == (60 + 31) * 2 * 2 * row
    query = rand(2, 4, 3, 8, seed=7)
    found, expected = (attend(query, [*c.visual, *c.text], of.scale) for c in (ours, raw))
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.04


@pytest.mark.parametrize("scaled", [True, False])
def test_rows_are_chosen_and_built_again(scaled: bool) -> None:
    rows = Float8Rows.pack(rand(3, 2, 5, 8), scaled)
    chosen = rows.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.read(torch.float32), rows.read(torch.float32)[[2, 0]])
    assert torch.equal(rows.with_tensors(chosen.tensors()).read(torch.float32), chosen.read(torch.float32))
    assert torch.equal(rows.to("cpu").read(torch.float32), rows.read(torch.float32))
    assert rows.shape == (3, 2, 5, 8) and rows.shared() == ()


def test_other_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("scales 'channel' is neither 'none' nor 'token-head'.")):
        Fp8("channel")
