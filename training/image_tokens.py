"""Visual tokens of the images of a data set, and the tiles that they fill."""

from transformers import PreTrainedModel

from kvcapsule.errors import DataError
from kvcapsule.vlm.spans import find_spans

from .datamodule import Questions


def whole_image(model: PreTrainedModel, data: Questions, align: int) -> int:
    """Visual tokens of one image, where all images of a batch have equally many; those in whole blocks of `align`
    tokens wherever the image begins.

    Raises:
        DataError: where they differ: a whole-image map has one size. And where an image may hold no whole block.
    """
    batch = next(iter(data.val_dataloader()))
    lengths = sorted({span.length for span in find_spans(model.config, batch.inputs["input_ids"], batch.inputs)})
    if len(lengths) != 1:
        shown = f"images of {', '.join(map(str, lengths))} visual tokens" if lengths else "no image"
        raise DataError(
            f"a whole-image capsule needs images of one size, but a batch has {shown}: give a tile, as in"
            " --codec.tile 64."
        )
    tile = (lengths[0] - align + 1) // align * align
    if tile < 1:
        raise DataError(
            f"an image of {lengths[0]} visual tokens does not hold a whole block of {align} wherever it begins: choose"
            f" a --codec.align of at most {(lengths[0] + 1) // 2}."
        )
    return tile
