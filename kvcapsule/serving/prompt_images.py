"""The images of a prompt as an image store knows them. Needs no vLLM."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..store.entry import StoreKey
from .image_blocks import TileBlocks, tile_blocks


class PromptImage(NamedTuple):
    """An image of a prompt, with the text before it, and the key of its entry."""

    start: int
    """Position of its first token."""
    length: int
    text: int
    """Tokens of text right before it: all since the image before."""
    run: TileBlocks | None
    """Its tiles; None: it holds none, and all of it is raw."""
    key: StoreKey

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.start + self.length

    @property
    def first(self) -> int:
        """Position of the first token that its entry holds."""
        return self.start - self.text

    def raw(self, block: int) -> list[int]:
        """Positions of its tokens that are in no tile."""
        if self.run is None:
            return list(range(self.start, self.end))
        first, last = self.run.first_block * block, self.run.end_block * block
        return [*range(self.start, first), *range(last, self.end)]


def prompt_images(
    places: Sequence[tuple[int, int]], keys: Sequence[StoreKey], block: int, tile: int
) -> list[PromptImage]:
    """The images of a prompt.

    Args:
        places: (first token, number of tokens) of each, in their order.
        keys: of each.
        block: tokens of a block.
        tile: tokens of a tile.
    """
    images, behind = [], 0
    for (start, length), key in zip(places, keys, strict=True):
        run = next(iter(tile_blocks([(start, length)], block, tile)), None)
        images.append(PromptImage(start, length, start - behind, run, key))
        behind = start + length
    return images


class Plan(NamedTuple):
    """What the next admission of a request gets from the store."""

    images: Sequence[PromptImage]
    """All of its prompt; none where the store is not used for it."""
    data: Sequence[bytes]
    """Of the first images, which are loaded."""
    exact_tokens: int
    """Tokens that may enter the engine's prefix cache."""
    missed: int
    """Images that the store does not know."""

    @property
    def runs(self) -> list[TileBlocks]:
        """The tiles of what is loaded."""
        return [image.run for image, _ in zip(self.images, self.data, strict=False) if image.run is not None]


class Load(NamedTuple):
    """Images of a request that workers take from stored bytes before the step's tokens are computed."""

    request: str
    images: Sequence[PromptImage]
    data: Sequence[bytes]
    slots: Sequence[int]
    """Of all their tiles."""
    first: int
    """Position of the first token that is loaded: what is before it is in the request's blocks already."""


class Save(NamedTuple):
    """An image that workers give to the store once the step's tokens are computed."""

    request: str
    image: PromptImage
    slots: Sequence[int]


def plain_bytes(data: object) -> bytes | None:
    """What an image's values of kinds other than tensors are, as bytes that tell them apart; None for other kinds."""
    if isinstance(data, str | int | float | bool | None):
        return repr(data).encode()
    if isinstance(data, list | tuple):
        parts = [plain_bytes(item) for item in data]
        if any(part is None for part in parts):
            return None
        return b"[" + b",".join(part for part in parts if part is not None) + b"]"
    if isinstance(data, Mapping):
        return plain_bytes([list(item) for item in sorted(data.items())])
    return None
