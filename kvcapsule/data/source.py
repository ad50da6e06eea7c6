"""Any source of image, prompt and answer: the built-in ones, or whatever can be read as questions about images."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import DataError, PackageError
from ..testbeds import easy_vqa, emoji, pages, words
from ..testbeds.digits import SPLITS
from .formats import format_of
from .question_set import question_set
from .question_stream import QuestionStream
from .source_config import PAGES as PAGES
from .source_config import SourceConfig as SourceConfig
from .table import open_table

# `datasets` comes with the extras [train] and [eval]; reading an image file (`kvcapsule generate`) needs none of it.
if TYPE_CHECKING:
    import datasets

PICTURES: dict[str, "Callable[[str, int, int], datasets.Dataset]"] = {
    "emoji": emoji.emoji,
    "easy-vqa": easy_vqa.easy_vqa,
    "words": words.words,
}
"""The sources of smol-vlm, by name: functions of (split, size, seed). They are fetched as packages on first use."""
MIXED = "pictures"
"""The name of these three in turn, question by question; its tasks begin with the source: emoji-place."""
MOST_DRAWN = 1_000_000
"""Questions of a built-in source, which is drawn as a whole before a run."""


def is_built_in(source: str) -> bool:
    """Whether the questions of a source are kvcapsule's own, with its tasks and their rules of scoring."""
    return source in pages.HEIGHTS or source in PICTURES or source == MIXED


def load(config: SourceConfig) -> "datasets.Dataset":
    """At most `size` questions, shuffled.

    Returns:
        A data set with the columns image (one or a list), prompt, answer and task. Where the source is not built in,
        also answers (all accepted, the first is `answer`), choices (options of a multiple-choice question, or none) and
        _row (how the user counts it); and `info.description` says in a line how the data were read.

    Raises:
        DataError: if the source, its subset or its split is not there, if it is of no known format, or if a row cannot
            be used; the message names what there is.
    """
    _require_size(config)
    if is_built_in(config.source):
        return _built_in(config)
    table = open_table(config)
    return question_set(table, format_of(table.columns, table.rows[0], config), config)


def stream(config: SourceConfig, held_out: int) -> QuestionStream:
    """The same questions, read one after the other: no more of them is in memory than a shuffle's buffer.

    held_out: how many of the first ones are held out.

    Raises:
        DataError: as `load`, at once for what the first rows show, else when the row is read.
    """
    _require_size(config)
    if is_built_in(config.source):
        _refuse_options(config)
    return QuestionStream(config, held_out)


def _require_size(config: SourceConfig) -> None:
    if config.size < 1:
        raise DataError(f"data size {config.size}: at least one question is needed.")


def _refuse_options(config: SourceConfig) -> None:
    """Raises DataError for what built-in data do not have."""
    for option, value in (("subset", config.subset), ("format", config.format), ("streaming", config.streaming)):
        if value:
            raise DataError(f"--data.{option} is for other data: {config.source} is built in.")


def _built_in(config: SourceConfig) -> "datasets.Dataset":
    if config.split not in SPLITS:
        raise DataError(f"{config.source} has no split {config.split!r}; it has {', '.join(SPLITS)}.")
    _refuse_options(config)
    if config.size > MOST_DRAWN:
        raise DataError(f"--data.size {config.size}: at most {MOST_DRAWN:,} questions of {config.source} are drawn.")
    if config.source in pages.HEIGHTS:
        return pages.pages(config.split, config.size, config.seed, height=pages.HEIGHTS[config.source])
    return _pictures(config)


def _pictures(config: SourceConfig) -> "datasets.Dataset":
    import datasets

    try:
        if config.source != MIXED:
            return PICTURES[config.source](config.split, config.size, config.seed)
        share = -(-config.size // len(PICTURES))
        parts = [_of(name, draw(config.split, share, config.seed)) for name, draw in PICTURES.items()]
    except PackageError as error:
        raise DataError(f"{config.source} cannot be fetched: {error}") from error
    mixed = datasets.interleave_datasets(parts)
    return mixed.select(range(min(config.size, len(mixed))))


def _of(name: str, rows: "datasets.Dataset") -> "datasets.Dataset":
    """The rows, with the source in front of their tasks."""
    tasks = [f"{name}-{task}" for task in rows["task"]]
    return rows.remove_columns("task").add_column("task", tasks, feature=rows.features["task"])
