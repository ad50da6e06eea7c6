"""Two passes of the frozen VLM over all questions, and checks that the questions and the model can be studied."""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from rich.console import Console
from transformers import PreTrainedModel

from kvcapsule.cli.progress import Stages
from kvcapsule.errors import InputError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed

from ..harvest import LayerHarvest, Recorder
from .layer import LayerStudy
from .layer_group import LayerGroupStudy, layer_groups_of
from .questions import Batch, Reader

SAMPLES = 8
"""Smallest number of samples per component of an axis. A tile gives the token axis one sample per channel of the head,
and the channel axis one per token.

On pages-vlm with full images, the predicted error of the transform is a third too low with 2 samples, a fifth with 4,
and a twelfth with 10.
"""
LEAST_TILES = 32
"""Smallest number of tiles for the variance of a coefficient."""
Visit = Callable[[LayerPrefill, LayerHarvest | None], None]
"""Called with a layer's prefill, and its tiles if the batch fills any."""


class Observer(Recorder):
    """Recorder that passes each layer to a callback as it ends, so that only one layer's activations are in memory."""

    def __init__(self, tile: int, canonical: bool, visit: Visit) -> None:
        super().__init__(tile, canonical)
        self.visit = visit

    def compress(self, prefill: LayerPrefill) -> Compressed:
        tiles = None
        if any(span.length >= self.tile for span in prefill.spans):
            try:
                super().compress(prefill)
            except ValueError as error:
                raise InputError(f"{error} Here: --canonical_frame false.") from error
            tiles = self.layers.pop()
        self.visit(prefill, tiles)
        return Compressed([], [])


@torch.no_grad()
def watch(model: PreTrainedModel, batch: Batch, observer: Observer) -> None:
    """Run the frozen model over a batch, as `harvest` does; a batch without images is skipped."""
    if not batch.spans:
        return
    with attach(model):
        cache = CapsuleCache(model.config, observer)
        model(**batch.inputs.to(model.device), **cache_argument(cache), logits_to_keep=1)


def whole_image(reader: Reader) -> int:
    """Number of visual tokens per image.

    Raises:
        InputError: if images differ in size, or there is none.
    """
    by_batch = ({span.length for span in batch.spans} for batch in reader.batches(answers=False))
    lengths: set[int] = next((lengths for lengths in by_batch if lengths), set())
    _require_visual(lengths, reader.model)
    return one_size(lengths)


def one_size(lengths: set[int]) -> int:
    """The common length of all images.

    Raises:
        InputError: if lengths differ.
    """
    if len(lengths) > 1:
        sizes = ", ".join(map(str, sorted(lengths)))
        raise InputError(
            f"images of {sizes} visual tokens: a study of whole images needs one size. Give a tile, as in --tile 64."
        )
    return next(iter(lengths))


def two_passes(
    reader: Reader, tile: int, full_image: bool, canonical: bool, console: Console
) -> tuple[list[LayerStudy], list[LayerGroupStudy]]:
    """Study every layer and every layer group: the first pass gathers moments, raw similarity and drift, the second
    centred similarity and coefficients.

    Args:
        reader: the questions and the model.
        tile: visual tokens of a tile.
        full_image: whether a tile must be a full image.
        canonical: whether keys are studied in the canonical frame.
        console: for progress, and the reason if layer groups are left out.

    Raises:
        InputError, DataError: for questions or activations that cannot be studied.
    """
    layers: dict[int, LayerStudy] = {}
    joint = layer_groups_of(reader.model)
    group_of = {layer: study for study in joint for layer in study.layers}
    lengths: set[int] = set()
    answers: Sequence[range] = ()

    def first(prefill: LayerPrefill, tiles: LayerHarvest | None) -> None:
        if prefill.layer not in layers:
            layers[prefill.layer] = LayerStudy(prefill)
        layers[prefill.layer].first(prefill, tiles, answers)
        group_of[prefill.layer].first(tiles)

    def second(prefill: LayerPrefill, tiles: LayerHarvest | None) -> None:
        layers[prefill.layer].second(prefill, tiles)
        if joint:
            group_of[prefill.layer].second(tiles)

    with Stages(console) as progress:
        bar = progress.add_task("moments, similarity, drift", total=len(reader))
        for batch in reader.batches(answers=True):
            lengths.update(span.length for span in batch.spans)
            if full_image:
                one_size({tile, *lengths})
            answers = batch.answers
            watch(reader.model, batch, Observer(tile, canonical, first))
            progress.advance(bar)
        studies = [layers[index] for index in sorted(layers)]
        _require_visual(lengths, reader.model)
        _require_layers(studies, reader.model)
        _require_samples(studies[0].count, tile, max(lengths), len(reader.rows), studies[0].dim)
        if lacking := _lacking_for_layer_groups(studies, joint, tile, len(reader.rows)):
            console.print(lacking)
            joint = []
        for study in joint:
            study.solve([layers[index] for index in study.layers])
        bar = progress.add_task("coefficients", total=len(reader))
        for batch in reader.batches(answers=False):
            watch(reader.model, batch, Observer(tile, canonical, second))
            progress.advance(bar)
    return studies, joint


def _require_visual(lengths: set[int], model: PreTrainedModel) -> None:
    if not lengths:
        raise InputError(f"{model.config.model_type}: its prompts hold no visual tokens, so there is nothing to study.")


def _require_layers(layers: Sequence[LayerStudy], model: PreTrainedModel) -> None:
    if not layers:
        raise InputError(
            f"{model.config.model_type}: it has no layer with full attention, so no layer's cache holds a whole image."
        )
    if not layers[0].drift.steps:
        raise InputError(
            "no prompt has text between its last image and its answer, so nothing can be said of attention's drift."
        )


def _require_samples(tiles: int, tile: int, longest: int, questions: int, dim: int) -> None:
    """Check that there are enough samples for bases and variances; with few, the prediction is too optimistic.

    Raises:
        InputError: with the number of questions that would suffice.
    """
    if tiles == 0:
        raise InputError(
            f"no image fills a tile of {tile}: the largest has {longest} visual tokens. Give a --tile of at most"
            f" {longest}."
        )
    needed = max(LEAST_TILES, ceil(SAMPLES * tile / dim), ceil(SAMPLES * dim / tile))
    if tiles < needed:
        raise InputError(
            f"{questions} questions gave {tiles} tiles of {tile} visual tokens, too few for a stable basis, which asks"
            f" for {needed} (at least {LEAST_TILES}; tiles x head dim >= {SAMPLES} x tile; tiles x tile >= {SAMPLES} x"
            f" head dim; head dim {dim}). Give --questions {ceil(needed * questions / tiles)} or"
            f" more{', or a smaller --tile' if tile > dim else ''}."
        )


def _lacking_for_layer_groups(
    layers: Sequence[LayerStudy], joint: Sequence[LayerGroupStudy], tile: int, questions: int
) -> str:
    """Why layer groups cannot be studied, or "": they have more channels than a layer, and need more samples."""
    tokens, channels = (
        layers[0].count * tile,
        max(2 * len(study.layers) * study.heads for study in joint) * layers[0].dim,
    )
    if tokens >= SAMPLES * channels:
        return ""
    return (
        f"Layer groups are left out: {tokens} visual tokens in full tiles are too few for axes of their {channels}"
        f" channels, which ask for {SAMPLES} each. For these too, give --questions"
        f" {ceil(SAMPLES * channels * questions / tokens)} or more."
    )
