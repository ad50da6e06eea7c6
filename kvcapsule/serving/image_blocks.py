"""Which blocks of a request's KV cache lie wholly within an image, in whole tiles."""

from collections.abc import Sequence
from typing import NamedTuple

from ..methods.tiles import tile_starts


class TileBlocks(NamedTuple):
    """The tiles of one image: whole blocks, one after the other."""

    first_block: int
    """Index in the request's block table."""
    blocks: int
    tiles: int
    end: int
    """Position behind the image's last token, tiles or not."""

    @property
    def end_block(self) -> int:
        """Index just past the last block."""
        return self.first_block + self.blocks


def tile_blocks(images: Sequence[tuple[int, int]], block: int, tile: int) -> list[TileBlocks]:
    """The tiles of each image that holds one.

    Args:
        images: (first token, number of tokens) of each.
        block: tokens of a block.
        tile: tokens of a tile, a multiple of block.
    """
    return [
        TileBlocks(starts[0] // block, len(starts) * tile // block, len(starts), start + length)
        for start, length in images
        if (starts := tile_starts(start, length, tile, align=block))
    ]
