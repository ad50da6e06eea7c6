"""Rows of a data set as batches of a model's inputs."""

from collections.abc import Iterator
from typing import NamedTuple

import datasets
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from kvcapsule.data.batches import Question, encode_questions, question_batches
from kvcapsule.errors import InputError

from .equal_bytes import Layout


class Batch(NamedTuple):
    """Questions and their inputs, left-padded, on the model's device."""

    questions: list[Question]
    inputs: BatchFeature
    layout: Layout


def batches(rows: datasets.Dataset, model: PreTrainedModel, processor: ProcessorMixin, size: int) -> Iterator[Batch]:
    """All rows in their order, `size` at a time; images are read batch by batch.

    Raises:
        DataError: naming the row, if an image cannot be read or there is no answer to compare with.
        InputError: if the processor cannot take them, or if their inputs have no visual tokens.
    """
    for questions in question_batches(rows, size):
        yield make_batch(questions, model, processor)


def make_batch(questions: list[Question], model: PreTrainedModel, processor: ProcessorMixin) -> Batch:
    """One batch of inputs; see `batches`."""
    inputs, spans = encode_questions(questions, model, processor)
    if not spans:
        raise InputError(
            f"{model.config.model_type}: its prompts hold no visual tokens, so there is nothing to compress."
        )
    layout = Layout(spans, inputs["attention_mask"].bool())
    return Batch(questions, inputs.to(model.device), layout)


def by_task(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows sorted by task: a batch takes as many steps as its longest answer, and answers of a task have similar
    lengths."""
    tasks = list(rows["task"])
    order = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    return rows.select(sorted(range(len(rows)), key=lambda i: order[tasks[i]]))
