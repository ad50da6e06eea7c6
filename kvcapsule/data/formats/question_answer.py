"""Columns of question and answer, or of a question and all its accepted answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...errors import DataError
from ..source_config import SourceConfig
from .base import ANSWERS, PROMPTS, Format, ParsedRow, column, image_columns, text_of, texts_of


@dataclass(frozen=True)
class QuestionAnswer(Format):
    """A text and the one right answer."""

    several: ClassVar[bool] = False
    """Whether the first row has a list of answers."""
    name = "question-answer"
    needs = "image, prompt (or question), answer"
    images: tuple[str, ...]
    prompt: str
    answer: str

    @classmethod
    def recognise(cls, columns: Sequence[str], first: Mapping[str, Any], config: SourceConfig) -> Self | None:
        prompt = column(columns, config.prompt, SourceConfig.prompt, PROMPTS)
        answer = column(columns, config.answer, SourceConfig.answer, ANSWERS)
        images = image_columns(columns, config)
        if prompt is None or answer is None or not images:
            return None
        several = isinstance(first[answer], list | dict)
        return cls(images, prompt, answer) if config.format or several == cls.several else None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.prompt, self.answer

    def read(self, row: Mapping[str, Any]) -> ParsedRow:
        prompt, answer = text_of(row[self.prompt], "prompt"), row[self.answer]
        if isinstance(answer, list | dict):
            raise DataError(
                "the answer is a list or an object, expected text; --data.format question-answers has both."
            )
        return ParsedRow(prompt, (text_of(answer, "answer"),))


@dataclass(frozen=True)
class QuestionAnswers(QuestionAnswer):
    """A text and all accepted answers; a row may have a single text."""

    several = True
    name = "question-answers"
    needs = "image, prompt (or question), answers: a list of texts"

    def read(self, row: Mapping[str, Any]) -> ParsedRow:
        return ParsedRow(text_of(row[self.prompt], "prompt"), texts_of(row[self.answer], "answer"))

    def note(self, parsed_rows: Sequence[ParsedRow]) -> str:
        return f"first answer of up to {max(len(parsed.answers) for parsed in parsed_rows)} learned, all accepted"
