"""The most channels that a transform code may have within an upper limit of its decoder maps' bytes."""

from collections.abc import Sequence

from kvcapsule.errors import ConfigError
from kvcapsule.segments.bit_packing import GROUP

_BYTES = 2
"""Of a number of the maps."""
_DEFAULT, _CHANNELS = 32e6 / 2**20, 32 * 8 * 128
"""MiB (32 million bytes) that maps take at most unless told otherwise, of a model with so many channels in all layers
and KV heads (a 7B with grouped queries) or fewer; of one with more, as many times more."""


def default_limit(channels: int, sources: Sequence[tuple[int, int]], tile: int) -> float:
    """MiB, 0 for none: where the maps along the tokens take half of it already, as of whole images, fewer channels are
    no way to save.

    Args:
        channels: of the model's keys, in all layers and KV heads.
        sources, tile: as in `most_channels`.
    """
    limit = _DEFAULT * max(1.0, channels / _CHANNELS)
    along_tokens = sum(map_bytes(sets, width, tile, 0) for sets, width in sources) / 2**20
    return 0.0 if along_tokens > limit / 2 else limit


def map_bytes(sets: int, width: int, tile: int, channels: int) -> int:
    """Bytes at 16 bits a number of what reads one source: its sets' maps along tokens and channels, offsets, steps and
    widths.

    Args:
        sets: of KV heads.
        width: channels of the source: those of a set's heads, of all its parts.
        tile: tokens; as many rows, in groups of eight.
        channels: that are coded.
    """
    groups = -(-tile // GROUP)
    rows = GROUP * groups
    return sets * (_BYTES * (tile * rows + channels * (width + rows + groups)) + channels * groups)


def most_channels(limit: float, sources: Sequence[tuple[int, int]], tile: int) -> list[int]:
    """The most channels that each source may code, the same share of its own in all; all of them where no bound is
    reached.

    Args:
        limit: MiB of all maps; 0 sets no bound.
        sources: sets and width of each.
        tile: tokens.

    Raises:
        ConfigError: if the maps of one channel each take more.
    """
    widths = [width for _, width in sources]
    if not limit:
        return widths
    least = sum(map_bytes(sets, width, tile, 0) for sets, width in sources)
    along_channels = sum(map_bytes(sets, width, tile, width) for sets, width in sources) - least
    share = (limit * 2**20 - least) / along_channels
    if any(share * width < 1 for width in widths):
        needed = sum(map_bytes(sets, width, tile, 1) for sets, width in sources) / 2**20
        raise ConfigError(
            f"--transform.maps {limit}: the maps of one coded channel of every source take {needed:.3f} MiB at tiles of"
            f" {tile} tokens. Allow more, or choose a smaller --codec.tile."
        )
    return [min(width, int(share * width)) for width in widths]
