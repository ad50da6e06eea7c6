"""What a form of data is, and the rules that all of them share: what a text may be, and how columns are named."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from ...errors import DataError
from ..source_config import SourceConfig

PROMPTS, ANSWERS, IMAGES = ("question", "query"), ("answers",), ("images",)
"""Names of columns that are understood beside the options' defaults."""
_NUMBERED = re.compile(r"image_\d+")


class ParsedRow(NamedTuple):
    """What a row holds, in whichever format."""

    prompt: str
    answers: tuple[str, ...]
    """All accepted answers; the first is learned."""
    choices: tuple[str, ...] = ()
    """Texts of the options of a multiple-choice question."""
    images: tuple[Any, ...] | None = None
    """Images that lie within the texts; None: they are those of the image column."""
    task: str | None = None
    """Kind of question, where the format has it; None: that of the task column."""
    turns: int = 1
    """Questions of the row, of which the first is read."""


class Format(ABC):
    """One form of columns. An instance knows the names of the columns in one data set."""

    name: ClassVar[str]
    """As --data.format names it."""
    needs: ClassVar[str]
    """The columns that it needs, for messages."""
    images: tuple[str, ...]
    """The columns with images; several are taken together. Empty: images lie within the texts."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns with texts."""

    @classmethod
    @abstractmethod
    def recognise(cls, columns: Sequence[str], first: Mapping[str, Any], config: SourceConfig) -> Self | None:
        """The format of a data set with these columns and this first row; None if it is of another form."""

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> ParsedRow:
        """A row with the columns `columns`.

        Raises:
            DataError: if a text is missing or is none; the caller names the row.
        """

    def note(self, parsed_rows: Sequence[ParsedRow]) -> str:
        """What should be known about how rows were read; empty if there is nothing to say."""
        turns = max(parsed.turns for parsed in parsed_rows)
        return f"first question of up to {turns} learned" if turns > 1 else ""


def column(columns: Sequence[str], name: str, default: str, others: Sequence[str]) -> str | None:
    """The column that an option names, or one of the other names if the option has its default."""
    if name in columns:
        return name
    return next((other for other in others if other in columns), None) if name == default else None


def image_columns(columns: Sequence[str], config: SourceConfig) -> tuple[str, ...]:
    """The image column, or image_1, image_2, ... in their order; empty if there is none."""
    one = column(columns, config.image, SourceConfig.image, IMAGES)
    if one is not None:
        return (one,)
    numbered = [name for name in columns if _NUMBERED.fullmatch(name)]
    return tuple(sorted(numbered, key=lambda name: int(name.removeprefix("image_"))))


def text_of(value: Any, what: str) -> str:
    """A text, or a whole number as its digits: the one rule for prompts and answers.

    Raises:
        DataError: for anything else, and for an empty text; `what` names it.
    """
    if value is None:
        raise DataError(f"the {what} is missing, expected text.")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"the {what} is {_kind(value)}, expected text (or a whole number).")
    if not value.strip():
        raise DataError(f"the {what} is empty, expected text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the {what} holds half of a surrogate pair at character {error.start + 1}.") from error
    return value


def texts_of(value: Any, what: str) -> tuple[str, ...]:
    """A text or a list of texts, each by the rule of `text_of`; VQA's {"answer": text} is its text.

    Raises:
        DataError: as `text_of`, and for an empty list.
    """
    if isinstance(value, Mapping):
        value = value.get("answer", value.get("text"))
    if not isinstance(value, list | tuple):
        return (text_of(value, what),)
    if not value:
        raise DataError(f"the {what} is an empty list, expected text.")
    return tuple(text_of(item.get("answer") if isinstance(item, Mapping) else item, what) for item in value)


def items_of(value: Any, what: str) -> list[Mapping[str, Any]]:
    """A list of objects; an object of lists, as `datasets` had it in former times, too.

    Raises:
        DataError: if it is neither.
    """
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        if len({len(part) for part in value.values()}) > 1:
            raise DataError(f"the column {what} holds lists of several lengths, expected equally many of each.")
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"the column {what} holds {_kind(value)}, expected a list of turns.")
    if not value:
        raise DataError(f"the column {what} is an empty list, expected turns.")
    return value


def has_keys(value: Any, keys: Iterable[str]) -> bool:
    """Whether it is a list of objects (or an object of lists) with these keys."""
    item = value[0] if isinstance(value, list) and value else value
    return isinstance(item, Mapping) and set(keys) <= set(item)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true or false", float: "a number with decimals", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
