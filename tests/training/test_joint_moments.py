"""Second moments of several parts side by side, and the sample of tiles that is held beside them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builders import rand

from kvcapsule.training.joint_moments import JointMoments
from kvcapsule.training.second_moments import Moments
from kvcapsule.training.tile_sample import TileSample

NAMES = ("total", "tokens", "channels", "count")


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments(*x.shape[1:])
    moments.add(x)
    return moments


def assert_equal(one: Moments, other: Moments) -> None:
    for name in NAMES:
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def joint() -> tuple[JointMoments, list[torch.Tensor]]:
    """Of three parts of seven channels, whose nine tiles came in two batches."""
    parts = [rand(9, 2, 5, 7, seed=i) for i in range(3)]
    moments = JointMoments(3, 2, 5, 7)
    moments.add([x[:4] for x in parts])
    moments.add([x[4:] for x in parts])
    return moments, parts


def test_a_parts_own_moments_are_blocks_of_the_joint_ones() -> None:
    moments, parts = joint()
    for index, part in enumerate(parts):
        assert_equal(moments.part(index), moments_of(part))


def test_moments_in_other_coordinates_are_those_of_mapped_tiles() -> None:
    moments, parts = joint()
    into = rand(3, 2, 7, 7, seed=9)
    mapped = moments_of(torch.cat([x @ m for x, m in zip(parts, into, strict=True)], dim=3))
    assert_equal(moments.mapped(into, mapped.tokens), mapped)


def test_a_mean_that_outweighs_what_varies_leaves_its_spread_exact() -> None:
    """Tiles in fp32 about a mean a hundred times what varies about it."""
    tiles = (100 + rand(400, 1, 4, 3)).float()
    moments = JointMoments(1, 1, 4, 3)
    moments.add([tiles])
    centred = (tiles.double() - tiles.double().mean(0)).flatten(1, 2)
    wanted = torch.einsum("esd,esf->sdf", centred.transpose(0, 1), centred.transpose(0, 1)).sum(0)
    torch.testing.assert_close(moments.part(0).spread()[0], wanted, rtol=1e-8, atol=0)


def layer(number: float, rows: list[int], dtype: torch.dtype = torch.float32) -> Any:
    tiles = number + torch.arange(len(rows) * 2 * 4 * 8, dtype=torch.float32).view(len(rows), 2, 4, 8).to(dtype) / 64
    return SimpleNamespace(keys=tiles, values=-tiles, owner=torch.tensor(rows))


def fill(sample: TileSample, batches: int, rows: list[int]) -> None:
    for step in range(batches):
        sample.begin([step * (max(rows) + 1) + i for i in range(max(rows) + 1)])
        for group in range(2):
            sample.add(group, [layer(100 * step + 10 * group, rows)])


ALL = 2 * 2 * 4 * 8 * 4 * 2 * 6
"""Bytes of the tiles of two layers in six batches of one row with one tile: keys and values, fp32."""


def test_all_tiles_are_held_as_they_are_where_they_fit() -> None:
    sample = TileSample(layers=2, batches=6, limit=ALL)
    fill(sample, 6, [0])
    assert sample.complete and not sample.half and sample.expected == 6
    found = list(sample.tiles(1))
    assert len(found) == 6
    assert torch.equal(found[2][0].keys, layer(210, [0]).keys) and torch.equal(found[2][0].values, -found[2][0].keys)


def test_then_in_16_bits_and_then_a_part_of_them_from_all_batches() -> None:
    half = TileSample(layers=2, batches=6, limit=ALL - 1)
    fill(half, 6, [0])
    assert half.complete and {tiles[0].keys.dtype for tiles in half.tiles(0)} == {torch.float16}
    torch.testing.assert_close(next(half.tiles(0))[0].keys.float(), layer(0, [0]).keys, atol=2e-3, rtol=1e-3)
    part = TileSample(layers=2, batches=60, limit=45 * ALL // 12)
    fill(part, 60, [0, 0, 1])
    counts = [len(tiles[0].keys) for tiles in part.tiles(0)]
    assert not part.complete and part.half and part.expected == pytest.approx(45), "of 180 tiles"
    assert 30 < sum(counts) < 60 and len(counts) > 20, "as chance has it, from many batches"
    assert [len(tiles[0].keys) for tiles in part.tiles(1)] == counts, "the same tiles of all layers"


def test_what_is_drawn_depends_on_a_rows_number_alone() -> None:
    """One process with batches of two rows, and two with a row each."""
    rows = [0, 0, 0, 1, 1, 1]
    one = TileSample(layers=1, batches=40, limit=6000, seed=3)
    for step in range(40):
        one.begin([2 * step, 2 * step + 1])
        one.add(0, [layer(step, rows)])
    drawn: list[torch.Tensor] = []
    for rank in range(2):
        own = TileSample(layers=1, batches=80, limit=6000, seed=3)
        for step in range(40):
            own.begin([2 * step + rank])
            tiles = layer(step, rows)
            mine = torch.tensor(rows) == rank
            own.add(0, [SimpleNamespace(keys=tiles.keys[mine], values=tiles.values[mine], owner=torch.zeros(3).long())])
        drawn += [x[0].keys for x in own.tiles(0)]
    together = torch.cat([x[0].keys for x in one.tiles(0)])
    assert 0 < len(together) < 240
    assert torch.equal(torch.cat(drawn).flatten(1).sum(1).sort().values, together.flatten(1).sum(1).sort().values)


def test_numbers_too_large_for_float16_are_held_in_bfloat16() -> None:
    sample = TileSample(layers=1, batches=1, limit=2 * 4 * 8 * 2 * 2)
    sample.begin([0])
    sample.add(0, [layer(1e6, [0])])
    (tiles,) = sample.tiles(0)
    assert tiles[0].keys.dtype == torch.bfloat16 and bool(tiles[0].keys.isfinite().all())
