"""The forms of columns that are understood, each recognised by its columns and its first row. A new form is a class and
its place in FORMATS."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import DataError
from ..source_config import SourceConfig
from .base import ANSWERS, PROMPTS, Format, column, image_columns
from .conversations import Cauldron, Llava, Messages
from .multiple_choice import MultipleChoice
from .question_answer import QuestionAnswer, QuestionAnswers

FORMATS: dict[str, type[Format]] = {
    form.name: form for form in (MultipleChoice, QuestionAnswer, QuestionAnswers, Llava, Messages, Cauldron)
}
"""By name; the first one that fits is taken."""
_COLUMNS = ("image", "prompt", "answer")
"""The options that name columns."""


def format_of(columns: Sequence[str], first: Mapping[str, Any], config: SourceConfig) -> Format:
    """The format of a data set, by --data.format or recognised.

    Args:
        columns: names of its columns.
        first: its first row, images undecoded.
        config: the options.

    Raises:
        DataError: if it is of none of the formats, or not of the one that --data.format names.
    """
    _require_distinct(config)
    if config.format is not None and config.format not in FORMATS:
        raise DataError(f"--data.format {config.format}: choose one of {', '.join(FORMATS)}.")
    kinds = [FORMATS[config.format]] if config.format else list(FORMATS.values())
    form = next((form for kind in kinds if (form := kind.recognise(columns, first, config)) is not None), None)
    has = f"it has {', '.join(columns)}."
    if form is None and config.format:
        raise DataError(f"{config.source} is not of the format {config.format} ({kinds[0].needs}); {has}")
    if form is None:
        missing = _missing(columns, config)
        known = "; ".join(f"{kind.name}: {kind.needs}" for kind in kinds)
        lacks = f"no column {', '.join(map(repr, missing))}" if missing else "no columns of a known format"
        raise DataError(
            f"{config.source} has {lacks}; {has} Name the right ones with --data.image, --data.prompt and"
            f" --data.answer, or give the columns of a format ({known})."
        )
    return form


def _missing(columns: Sequence[str], config: SourceConfig) -> list[str]:
    """The columns that a question and its answer lack."""
    there = {
        config.image: bool(image_columns(columns, config)),
        config.prompt: column(columns, config.prompt, SourceConfig.prompt, PROMPTS),
        config.answer: column(columns, config.answer, SourceConfig.answer, ANSWERS),
    }
    return [name for name, present in there.items() if not present]


def _require_distinct(config: SourceConfig) -> None:
    names = [*_COLUMNS, "task"]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if getattr(config, one) == getattr(config, other):
                raise DataError(
                    f"--data.{one} and --data.{other} both name the column {getattr(config, one)!r}: name one column"
                    " each, and none for llava, messages and cauldron, which have theirs."
                )
