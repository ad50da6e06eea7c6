"""The frozen VLM over all questions, twice, and the refusal of what cannot be studied."""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from kvcapsule.errors import InputError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed

from ..harvest import LayerHarvest, Recorder
from .layer import LayerStudy
from .questions import Batch, Reader
from .stack import StackStudy, stacks_of

SAMPLES = 8
"""Samples of an axis for each of its components: one tile gives the token axis as many as the head has channels, and
the other way round.

On pages-vlm, whole images: with 2 samples the transform's predicted error is a third too low, with 4 a fifth, with 10 a
twelfth.
"""
LEAST_TILES = 32
"""Tiles that the variance of a coefficient is measured on, at least."""
Visit = Callable[[LayerPrefill, LayerHarvest | None], None]
"""Sees a layer's prefill, and its tiles where the batch fills any."""


class Observer(Recorder):
    """A recorder that hands on each layer as it ends, so that one layer's activations are held at a time."""

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
    """Run the frozen model over a batch, as `harvest` does; a batch without images has nothing to be watched."""
    if not batch.spans:
        return
    with attach(model):
        cache = CapsuleCache(model.config, observer)
        model(**batch.inputs.to(model.device), **cache_argument(cache), logits_to_keep=1)


def whole_image(reader: Reader) -> int:
    """Visual tokens of one image.

    Raises:
        InputError: if images differ in size, or there are none.
    """
    lengths = next(
        (found for batch in reader.batches(answers=False) if (found := {span.length for span in batch.spans})), set()
    )
    _require_visual(lengths, reader.model)
    return one_size(lengths)


def one_size(lengths: set[int]) -> int:
    """The one length of all images.

    Raises:
        InputError: if there are several.
    """
    if len(lengths) > 1:
        found = ", ".join(map(str, sorted(lengths)))
        raise InputError(
            f"images of {found} visual tokens: a study of whole images needs one size. Give a tile, as in --tile 64."
        )
    return next(iter(lengths))


def two_passes(
    reader: Reader, tile: int, whole: bool, canonical: bool, console: Console
) -> tuple[list[LayerStudy], list[StackStudy]]:
    """The studies of every layer and of every stack: a pass for moments, raw similarity and drift, one for what is
    measured with them.

    Args:
        reader: the questions and the model.
        tile: visual tokens of a tile.
        whole: whether a tile is to be a whole image.
        canonical: whether keys are studied in their tile's frame.
        console: where progress is shown, and why there are no stacks if there are none.

    Raises:
        InputError, DataError: for questions or activations that cannot be studied.
    """
    layers: dict[int, LayerStudy] = {}
    joint = stacks_of(reader.model)
    stack = {layer: study for study in joint for layer in study.layers}
    lengths: set[int] = set()
    answers: Sequence[range] = ()

    def first(prefill: LayerPrefill, tiles: LayerHarvest | None) -> None:
        if prefill.layer not in layers:
            layers[prefill.layer] = LayerStudy(prefill)
        layers[prefill.layer].first(prefill, tiles, answers)
        stack[prefill.layer].first(tiles)

    def second(prefill: LayerPrefill, tiles: LayerHarvest | None) -> None:
        layers[prefill.layer].second(prefill, tiles)
        if joint:
            stack[prefill.layer].second(tiles)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("moments, similarity, drift", total=len(reader))
        for batch in reader.batches(answers=True):
            lengths.update(span.length for span in batch.spans)
            if whole:
                one_size({tile, *lengths})
            answers = batch.answers
            watch(reader.model, batch, Observer(tile, canonical, first))
            progress.advance(bar)
        found = [layers[index] for index in sorted(layers)]
        _require_visual(lengths, reader.model)
        _require_layers(found, reader.model)
        _require_samples(found[0].count, tile, max(lengths), len(reader.rows), found[0].dim)
        if lacking := _lacking_for_stacks(found, joint, tile, len(reader.rows)):
            console.print(lacking)
            joint = []
        for study in joint:
            study.solve([layers[index] for index in study.layers])
        bar = progress.add_task("coefficients", total=len(reader))
        for batch in reader.batches(answers=False):
            watch(reader.model, batch, Observer(tile, canonical, second))
            progress.advance(bar)
    return found, joint


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
    """Refuse bases and variances that would be drawn from too few samples: their prediction would be too good to be
    true.

    Raises:
        InputError: saying how many questions would do.
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


def _lacking_for_stacks(layers: Sequence[LayerStudy], joint: Sequence[StackStudy], tile: int, questions: int) -> str:
    """Why stacks cannot be studied, or nothing: they have more channels than a layer, and few samples flatter the more
    of them."""
    tokens, channels = (
        layers[0].count * tile,
        max(2 * len(study.layers) * study.heads for study in joint) * layers[0].dim,
    )
    if tokens >= SAMPLES * channels:
        return ""
    return (
        f"Stacks of layers are left out: {tokens} visual tokens in full tiles are too few for axes of their {channels}"
        f" channels, which ask for {SAMPLES} each. For these too, give --questions"
        f" {ceil(SAMPLES * channels * questions / tokens)} or more."
    )
