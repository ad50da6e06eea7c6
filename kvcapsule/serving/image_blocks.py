"""Which blocks of a request's KV cache lie wholly within an image, in whole tiles."""

from collections.abc import Sequence
from typing import NamedTuple


class TileRun(NamedTuple):
    """The tiles of one image: whole blocks, one after the other."""

    first_block: int
    """Index in the request's block table."""
    blocks: int
    tiles: int
    end: int
    """Position behind the image's last token, tiles or not."""

    @property
    def last_block(self) -> int:
        """Behind the last."""
        return self.first_block + self.blocks


def tile_runs(images: Sequence[tuple[int, int]], block: int, tile: int) -> list[TileRun]:
    """The tiles of each image that holds one.

    Args:
        images: (first token, number of tokens) of each.
        block: tokens of a block.
        tile: tokens of a tile, a multiple of block.
    """
    runs = []
    for start, length in images:
        first = -(-start // block)
        tiles = (start + length - first * block) // tile
        if tiles > 0:
            runs.append(TileRun(first, tiles * tile // block, tiles, start + length))
    return runs
