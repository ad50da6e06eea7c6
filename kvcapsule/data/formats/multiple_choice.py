"""Columns of a question, its options and the right one; the model is asked for the option's letter."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Self

from ...errors import DataError
from ..source_config import SourceConfig
from .base import ANSWERS, PROMPTS, Format, ParsedRow, column, image_columns, text_of, texts_of

_OPTIONS = ("options", "choices")
ASK = "Answer with the option's letter."
"""Ends the prompt of a multiple-choice question."""


@dataclass(frozen=True)
class MultipleChoice(Format):
    """A list of options, or columns A, B, C, ...; the answer is an index from 0, a letter or an option's text.

    A row without options is a question with a text as its answer.
    """

    name = "multiple-choice"
    needs = "image, prompt (or question), options (or choices, or A, B, ...), answer"
    images: tuple[str, ...]
    prompt: str
    answer: str
    options: tuple[str, ...]
    """One column with lists, or a column for each option."""

    @classmethod
    def recognise(cls, columns: Sequence[str], first: Mapping[str, Any], config: SourceConfig) -> Self | None:
        prompt = column(columns, config.prompt, SourceConfig.prompt, PROMPTS)
        answer = column(columns, config.answer, SourceConfig.answer, ANSWERS)
        listed = next((name for name in _OPTIONS if name in columns), None)
        lettered = tuple(letter for letter in ascii_uppercase if letter in columns)
        options = (listed,) if listed else lettered
        images = image_columns(columns, config)
        if prompt is None or answer is None or not images or not (listed or {"A", "B"} <= set(lettered)):
            return None
        return cls(images, prompt, answer, options)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.prompt, self.answer, *self.options

    def read(self, row: Mapping[str, Any]) -> ParsedRow:
        prompt, options = text_of(row[self.prompt], "prompt"), self._options(row)
        if not options:
            return ParsedRow(prompt, texts_of(row[self.answer], "answer"))
        lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
        letter = ascii_uppercase[right_option(options, row[self.answer])]
        return ParsedRow("\n".join([prompt, *lines, ASK]), (letter,), options)

    def _options(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if len(self.options) > 1:
            values = [row[name] for name in self.options]
            while values and values[-1] in (None, ""):
                values.pop()
            return texts_of(values, "options") if values else ()
        value = row[self.options[0]]
        if isinstance(value, str):
            # CSV files, and MMMU, have the list as its Python text.
            try:
                value = ast.literal_eval(value) if value.strip() else []
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                raise DataError(f"the options are the text {value[:40]!r}, expected a list.") from error
        if value is not None and not isinstance(value, list):
            raise DataError(f"the options are of type {type(value).__name__}, expected a list of texts.")
        if value and len(value) > len(ascii_uppercase):
            raise DataError(f"there are {len(value)} options, and at most {len(ascii_uppercase)} have letters.")
        return texts_of(value, "options") if value else ()

    def note(self, parsed_rows: Sequence[ParsedRow]) -> str:
        return "the option's letter learned; numbers count options from 0"


def right_option(options: Sequence[str], answer: Any) -> int:
    """Index of the option that an answer names: by an index from 0, a letter (B, (B), B.) or its text.

    Raises:
        DataError: if it names none, or more than one.
    """
    text = text_of(answer, "answer").strip()
    bare = text.strip("().: ").upper()
    named = {index for index, option in enumerate(options) if option.strip() == text}
    if text.isdecimal():
        named.add(int(text))
    elif len(bare) == 1 and bare in ascii_uppercase:
        named.add(ascii_uppercase.index(bare))
    named = {index for index in named if index < len(options)}
    if len(named) != 1:
        raise DataError(
            f"the answer {text!r} names {'several' if named else 'none'} of the {len(options)} options (numbers count"
            " them from 0): give a letter."
        )
    (index,) = named
    return index
