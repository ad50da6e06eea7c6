"""Segments whose entries lie in a pool: read where they are, they give what a copy without a pool gives."""

import pytest
import torch

from kvcapsule.kernels import reference
from kvcapsule.kernels.cpu.attend import attend, split
from kvcapsule.segments.pooled_segment import PooledSegment
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment

HEADS, DIM = 2, 32


def raw_pool(places: int, tokens: int, seed: int = 0) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, places, HEADS, tokens, DIM, generator=generator)
    return Segment(keys, values, torch.arange(places))


def pools() -> dict[str, Segment]:
    generator = torch.Generator().manual_seed(1)
    raw = raw_pool(9, 32)
    angles = torch.randn(9, DIM // 2, generator=generator)
    with_maps = Segment(
        raw.keys[:, :, :8].contiguous(),
        raw.values[:, :, :8].contiguous(),
        raw.owner,
        score_map=torch.randn(HEADS, 48, 8, generator=generator),
        value_map=torch.randn(HEADS, 48, 8, generator=generator),
        bias=torch.randn(9, HEADS, 48, generator=generator),
        frame=Frame(angles.cos(), angles.sin()),
    )
    few_bits = Segment(QuantizedRows.pack(raw.keys, 4), QuantizedRows.pack(raw.values, 4), raw.owner)
    return {"raw": raw, "maps, bias and frame": with_maps, "4 bits": few_bits}


@pytest.mark.parametrize("kind", ["raw", "maps, bias and frame", "4 bits"])
def test_a_pool_is_read_in_place(kind: str) -> None:
    pool = pools()[kind]
    # An entry twice, entries of one batch row apart, and a batch row without any.
    owner, place = torch.tensor([0, 0, 3, 1, 3]), torch.tensor([7, 2, 7, 0, 5])
    segment, query = PooledSegment.of(pool, owner, place), torch.randn(4, 2 * HEADS, 1, DIM)
    tail = raw_pool(4, 3, seed=5)
    (_, args), _ = split(query, [segment, tail], 0.2)
    assert args is not None, "the kernels cover it"
    expected = reference.attend(query, [segment.gathered(), tail], 0.2)
    torch.testing.assert_close(attend(query, [segment, tail], 0.2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference.attend(query, [segment, tail], 0.2), expected)


@pytest.mark.parametrize("block", [16, 32, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("columns", [False, True])
def test_blocks_that_fill_up(block: int, columns: bool) -> None:
    """Rows of a paged cache; keys token by token, or channel by channel. What is not written is never read."""
    pool = raw_pool(6, block)
    counts = torch.tensor([block, 1, block, block - 1, 0])
    owner, place = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([4, 1, 4, 3, 2])
    for i, count in zip(place, counts, strict=True):
        pool.keys[i, :, count:], pool.values[i, :, count:] = torch.nan, torch.nan
    keys = pool.keys.transpose(2, 3).contiguous().transpose(2, 3) if columns else pool.keys
    segment = PooledSegment.of(Segment(keys, pool.values, pool.owner), owner, place, counts)
    query = torch.randn(2, 2 * HEADS, 1, DIM)
    ((_, args),) = split(query, [segment], 0.2)
    assert args is not None, "the kernels cover it"
    rows = [
        torch.cat([pool.keys[4], pool.keys[1, :, :1]], 1),
        torch.cat([pool.keys[4], pool.keys[3, :, : block - 1]], 1),
    ]
    values = [
        torch.cat([pool.values[4], pool.values[1, :, :1]], 1),
        torch.cat([pool.values[4], pool.values[3, :, : block - 1]], 1),
    ]
    for i in range(2):
        q = query[i].view(HEADS, 2, DIM)
        expected = (q @ rows[i].transpose(1, 2) * 0.2).softmax(-1) @ values[i]
        for out in (attend(query, [segment], 0.2), reference.attend(query, [segment], 0.2)):
            torch.testing.assert_close(out[i, :, 0].view(HEADS, 2, DIM), expected, rtol=1e-4, atol=1e-5)


def test_what_a_pool_cannot_hold() -> None:
    pool = raw_pool(3, 8)
    with pytest.raises(ValueError, match="as many places"):
        PooledSegment.of(pool, torch.tensor([0, 1]), torch.tensor([2]))
    with pytest.raises(ValueError, match="counts"):
        PooledSegment.of(pool, torch.tensor([0]), torch.tensor([2]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="int64"):
        PooledSegment.of(pool, torch.tensor([0]), torch.tensor([2], dtype=torch.int32))
    with pytest.raises(ValueError, match="raw rows"):
        PooledSegment.of(pools()["4 bits"], torch.tensor([0]), torch.tensor([2]), torch.tensor([1]))
