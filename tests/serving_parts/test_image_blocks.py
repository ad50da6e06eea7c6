"""Which blocks lie wholly within an image, in whole tiles."""

import pytest

from kvcapsule.serving.image_blocks import TileBlocks, tile_blocks


def test_hand_worked() -> None:
    # 196 tokens from 1 on: blocks 1 to 5 of 32 tokens, 32 to 191, lie within them; block 6 ends behind the image.
    assert tile_blocks([(1, 196)], block=32, tile=32) == [TileBlocks(1, 5, 5, 197)]
    # Tiles of two blocks: two of them.
    assert tile_blocks([(1, 196)], block=32, tile=64) == [TileBlocks(1, 4, 2, 197)]
    assert tile_blocks([(32, 64)], block=32, tile=64) == [TileBlocks(1, 2, 1, 96)]
    assert TileBlocks(1, 4, 2, 197).end_block == 5


@pytest.mark.parametrize(("start", "length"), [(1, 62), (31, 32), (0, 31), (5, 0)])
def test_too_short_an_image_has_none(start: int, length: int) -> None:
    assert tile_blocks([(start, length)], block=32, tile=32) == []


def test_two_images_keep_their_order() -> None:
    assert [run.first_block for run in tile_blocks([(1, 196), (210, 196)], block=32, tile=32)] == [1, 7]


@pytest.mark.parametrize("block", [1, 3, 16, 32])
@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_runs_lie_within_and_nothing_more_would(block: int, tiles: int) -> None:
    tile = tiles * block
    for start in range(40):
        for length in range(1, 120, 7):
            within = [b for b in range(200) if start <= b * block and (b + 1) * block <= start + length]
            runs = tile_blocks([(start, length)], block, tile)
            if len(within) < tiles:
                assert runs == []
                continue
            (run,) = runs
            assert run.blocks == run.tiles * tiles and run.end == start + length
            assert list(range(run.first_block, run.end_block)) == within[: len(within) // tiles * tiles]
