"""Questions of a data set, read row by row, and batches of them as a model's inputs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ..errors import DataError, InputError
from ..vlm.spans import VisualSpan, find_spans
from .prompts import conversation, encode
from .source import images_of


class Question(NamedTuple):
    """A row of a data set."""

    images: list[Image.Image]
    prompt: str
    answer: str
    task: str

    def conversation(self, answered: bool = False, before: str = "") -> list[dict[str, Any]]:
        """In transformers' chat form; answered: with the answer as the assistant's turn; before: text in front of the
        images."""
        return conversation(self.images, self.prompt, self.answer if answered else None, before)


def read_question(row: Mapping[str, Any], index: int) -> Question:
    """One row of a data set; index: its number, for messages.

    Raises:
        DataError: naming the row, if an image cannot be read or its prompt or answer is no text.
    """
    for column in ("prompt", "answer"):
        if not isinstance(row[column], (str, int, float)):
            raise DataError(f"row {index}: the {column} is of type {type(row[column]).__name__}, expected text.")
    return Question(images_of(row, index), str(row["prompt"]), str(row["answer"]), str(row.get("task", "")))


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
