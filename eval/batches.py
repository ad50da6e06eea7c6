"""A data set's rows as batches of a model's inputs."""

from collections.abc import Iterator
from typing import NamedTuple

import datasets
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from kvcapsule.data.prompts import conversation, encode
from kvcapsule.data.source import images_of
from kvcapsule.errors import DataError, InputError
from kvcapsule.vlm.spans import find_spans

from .equal_bytes import Layout


class Question(NamedTuple):
    """A row that has been read."""

    images: list[Image.Image]
    prompt: str
    answer: str
    task: str


class Batch(NamedTuple):
    """Questions and their inputs, left-padded, on the model's device."""

    questions: list[Question]
    inputs: BatchFeature
    layout: Layout


def batches(rows: datasets.Dataset, model: PreTrainedModel, processor: ProcessorMixin, size: int) -> Iterator[Batch]:
    """All rows in their order, `size` at a time; images are read when their turn comes.

    Raises:
        DataError: naming the row, if an image cannot be read or there is no answer to compare with.
        InputError: if the processor cannot make inputs of them, or the model sees no visual tokens in these.
    """
    for start in range(0, len(rows), size):
        asked = [read(rows, i) for i in range(start, min(start + size, len(rows)))]
        yield make_batch(asked, model, processor)


def make_batch(asked: list[Question], model: PreTrainedModel, processor: ProcessorMixin) -> Batch:
    """One batch of inputs; see `batches`."""
    try:
        inputs = encode(processor, [conversation(q.images, q.prompt) for q in asked], model.dtype)
        spans = find_spans(model.config, inputs["input_ids"], inputs)
    except ValueError as error:
        raise InputError(f"the model's processor cannot take these questions: {error}") from error
    if not spans:
        raise InputError(
            f"{model.config.model_type}: its prompts hold no visual tokens, so there is nothing to compress."
        )
    layout = Layout(spans, inputs["attention_mask"].bool())
    return Batch(asked, inputs.to(model.device), layout)


def read(rows: datasets.Dataset, index: int) -> Question:
    """One row; see `batches` for what it raises."""
    row = rows[index]
    for column in ("prompt", "answer"):
        if not isinstance(row[column], (str, int, float)):
            raise DataError(f"row {index}: the {column} is of type {type(row[column]).__name__}, expected text.")
    return Question(images_of(row, index), str(row["prompt"]), str(row["answer"]), str(row["task"]))
