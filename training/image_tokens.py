"""Visual tokens of a data set's images, known before the model runs, and the tiles that they fill."""

from typing import NamedTuple

from transformers import PreTrainedModel

from kvcapsule.errors import ConfigError, DataError
from kvcapsule.vlm.spans import find_spans

from .datamodule import Questions
from .recipe import REFERENCE_BITS

_NOTABLE = 0.95
"""Of the compression: what comes out is said beforehand where raw tokens leave less of it."""


class ImageTokens(NamedTuple):
    """The images of one batch of questions, which stand for those of all."""

    lengths: tuple[int, ...]
    """Visual tokens of each image."""
    questions: int
    """Questions of the batch."""

    @property
    def a_question(self) -> int:
        """Visual tokens of a question, on average."""
        return sum(self.lengths) // max(1, self.questions)

    @property
    def one_size(self) -> int:
        """Visual tokens of each image where all have equally many; else 0."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else 0

    def most_tiles(self, tile: int, questions: int) -> int | None:
        """The most tiles that so many questions fill; None where images differ, and further ones may be larger."""
        if not self.one_size:
            return None
        return self.one_size // tile * len(self.lengths) * -(-questions // self.questions)


def first_images(model: PreTrainedModel, data: Questions) -> ImageTokens:
    """The images of the first held-out batch, without a forward of the model."""
    batch = next(iter(data.val_dataloader()))
    spans = find_spans(model.config, batch.inputs["input_ids"], batch.inputs)
    return ImageTokens(tuple(span.length for span in spans), len(batch.answers))


def tile_of(images: ImageTokens, wanted: int, align: int) -> int:
    """Visual tokens of a tile: those that are wanted; 0 takes a whole image, where all have equally many tokens, and of
    it what is in whole blocks of `align` tokens wherever the image begins.

    Raises:
        DataError: if no image fills a tile; for whole images of several sizes; if an image may hold no whole block.
    """
    sizes = sorted(set(images.lengths))
    if wanted:
        if not sizes or sizes[-1] < wanted:
            largest = f"the largest image of the first ones has {sizes[-1]}" if sizes else "the prompts hold no image"
            raise DataError(
                f"--codec.tile {wanted}: nothing fills a tile of {wanted} visual tokens, {largest}. Choose a smaller"
                " tile, or data whose prompts hold images of the size that the capsule is for."
            )
        return wanted
    if len(sizes) != 1:
        shown = f"images of {', '.join(map(str, sizes))} visual tokens" if sizes else "no image"
        raise DataError(
            f"a whole-image capsule needs images of one size, but a batch has {shown}: give a tile, as in"
            " --codec.tile 64."
        )
    tile = (sizes[0] - align + 1) // align * align
    if tile < 1:
        raise DataError(
            f"an image of {sizes[0]} visual tokens does not hold a whole block of {align} wherever it begins: choose"
            f" a --codec.align of at most {(sizes[0] + 1) // 2}."
        )
    return tile


def require_one_row(compression: float, tile: int) -> None:
    """Raises ConfigError for fewer bytes than those of one row of a tile of so many tokens."""
    if compression > tile:
        raise ConfigError(
            f"a compression of {compression:g} cannot be reached: a tile of {tile} tokens stores one row at least:"
            f" {tile}x is the most. Ask for less (--compression), or take a larger --codec.tile."
        )


def raw_tokens_line(images: ImageTokens, tile: int, compression: float, element_bits: int) -> str | None:
    """One line on the tokens that fill no tile, with the compression that they leave; None where they hardly matter.

    Args:
        images: what is compressed.
        tile: visual tokens of a tile.
        compression: of a tile.
        element_bits: of the cache, in which such tokens stay raw.
    """
    total = sum(images.lengths)
    raw = sum(length % tile for length in images.lengths)
    left = total / ((total - raw) / compression + raw * element_bits / REFERENCE_BITS)
    if left >= _NOTABLE * compression:
        return None
    if size := images.one_size:
        divisor = next((t for t in range(tile, 0, -1) if size % t == 0 and 2 * t > tile), None)
        advice = "" if divisor is None else f" A --codec.tile of {divisor} leaves none."
        what = f"images of {size} visual tokens fill {size // tile} tiles of {tile}, and {size % tile} tokens"
    else:
        advice = " A smaller --codec.tile leaves fewer."
        what = f"{raw / total:.0%} of the visual tokens"
    return (
        f"{what} fill no tile and stay raw: {left:.1f}x is stored in all, of the {compression:.1f}x of tiles.{advice}"
    )
