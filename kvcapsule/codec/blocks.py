"""Tiles that begin and end with the blocks of a paged cache."""

from ..errors import ConfigError


def require_whole_blocks(tile: int, align: int) -> None:
    """Raises ConfigError unless tiles of `tile` tokens that begin at multiples of `align` also end there."""
    if align < 1:
        raise ConfigError(f"align {align} must be at least 1 token; 1 lets tiles begin at an image's first token.")
    if tile % align:
        raise ConfigError(
            f"tile {tile} is no multiple of align {align}, so a tile that begins with a block would end within one:"
            f" choose a tile of {max(align, tile // align * align)}."
        )
