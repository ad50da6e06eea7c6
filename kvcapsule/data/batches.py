"""Questions of a data set, read row by row, and batches of them as a model's inputs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ..errors import DataError, InputError
from ..vlm.spans import VisualSpan, find_spans
from .images import images_of
from .places import leading_dropped, numbered_places, require_places
from .prompts import conversation, encode

ROW = "_row"
"""The column that says how the user counts a row, such as "line 7 of data.jsonl"."""


class Question(NamedTuple):
    """A row of a data set."""

    images: list[Image.Image]
    prompt: str
    """With <image> where the images stand, unless they all stand before it."""
    answer: str
    """What is learned."""
    task: str
    answers: tuple[str, ...]
    """All that are right; the first is `answer`."""
    choices: tuple[str, ...] = ()
    """Texts of the options of a multiple-choice question, whose answer is a letter; else empty."""

    def conversation(self, answered: bool = False, before: str = "") -> list[dict[str, Any]]:
        """In transformers' chat form; answered: with the answer as the assistant's turn; before: text in front of the
        images."""
        return conversation(self.images, self.prompt, self.answer if answered else None, before)


def read_question(row: Mapping[str, Any], index: int) -> Question:
    """One row of `source.load`; index: its number, for messages about rows without the column ROW.

    Raises:
        DataError: naming the row, if an image cannot be read, or if the prompt has other than its number of places.
    """
    label, answer = row.get(ROW) or f"row {index + 1}", row["answer"]
    images = images_of(row, label)
    prompt = numbered_places(row["prompt"], len(images))
    try:
        require_places(prompt, len(images))
    except DataError as error:
        raise DataError(f"{label}: {error}") from error
    answers = tuple(row.get("answers") or (answer,))
    return Question(
        images, leading_dropped(prompt), answer, row.get("task") or "", answers, tuple(row.get("choices") or ())
    )


def question_batches(rows: datasets.Dataset, size: int) -> Iterator[list[Question]]:
    """All rows in their order, `size` at a time; images are read batch by batch. Raises as `read_question`."""
    for start in range(0, len(rows), size):
        yield [read_question(rows[i], i) for i in range(start, min(start + size, len(rows)))]


def encode_questions(
    questions: Sequence[Question], model: PreTrainedModel, processor: ProcessorMixin, answered: bool = False
) -> tuple[BatchFeature, list[VisualSpan]]:
    """Left-padded inputs of questions, with their answers if wanted, and the visual spans in them.

    Raises:
        InputError: if the processor cannot take them.
    """
    try:
        inputs = encode(processor, [question.conversation(answered) for question in questions], model.dtype)
        return inputs, find_spans(model.config, inputs["input_ids"], inputs)
    except ValueError as error:
        raise InputError(f"the model's processor cannot take these questions: {error}") from error
