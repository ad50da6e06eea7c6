"""From a table and its format to the questions that are used: chosen, read, and refused where they are no questions.

Texts and paths are read here, before anything runs; images are decoded when their batch is.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import DataError
from . import shares
from .batches import ROW, read_question
from .formats.base import Format, ParsedRow, text_of
from .image_files import WITHIN, ImageFile, content_digest, located
from .places import numbered_places, require_places
from .source_config import SourceConfig
from .table import Table

if TYPE_CHECKING:
    import datasets

_SHOWN = 3
"""Broken rows that are named."""


class _Row(NamedTuple):
    """A row, read."""

    number: int
    parsed: ParsedRow
    task: str
    images: list[ImageFile] | None
    """None: they stay in the table's image column."""


def question_set(table: Table, form: Format, config: SourceConfig) -> "datasets.Dataset":
    """The questions as `source.load` describes them.

    Raises:
        DataError: naming the row, if one cannot be used.
    """
    chosen = _chosen(table, form, config)
    texts = _only(table.rows, [*form.columns, *([config.task] if config.task in table.columns else [])])
    kept_in_table = _images_stay(table, form, chosen)
    pictures = None if kept_in_table else _only(table.rows, form.images)
    readable, places, broken = dict[int, _Row](), Counter[str](), list[str]()
    # In the table's order, so that the first row that is refused is its first.
    for index in _progress(sorted(chosen), "reading questions"):
        try:
            parsed, task = _read(texts[index], form, config)
            images = None if pictures is None else list(_located(parsed, pictures[index], form, table.folder, places))
            if images is not None:
                require_places(numbered_places(parsed.prompt, len(images)), len(images))
            readable[index] = _Row(index, parsed, task, images)
        except DataError as error:
            broken.append(f"{table.label(index)}: {error}")
            if not config.skip_broken:
                raise DataError(broken[-1]) from error
    rows = [readable[index] for index in chosen if index in readable]
    questions = _data_set(table, form, rows)
    if config.skip_broken:
        questions = questions.select(list(_unbroken(questions, broken)))
    if not len(questions):
        raise DataError(f"{config.source}: no row can be read; the first: {broken[0]}")
    questions.info.description = _description(table, form, rows, places, len(questions), broken)
    return questions


def _chosen(table: Table, form: Format, config: SourceConfig) -> list[int]:
    """Indices of at most config.size rows of the share that is wanted, shuffled.

    Raises:
        DataError: if the share is empty.
    """
    wanted: Sequence[int] = range(len(table))
    if not table.share.complete:
        texts, pictures = _only(table.rows, form.columns), _only(table.rows, form.images)
        every = _progress(wanted, "digests of images")
        digests = [_digests(texts[i], pictures[i], form, table.folder) for i in every]
        wanted = shares.rows_of(table.share, digests)
        if not wanted:
            raise DataError(
                f"{config.source} (split {config.split!r}) holds no rows: all {len(table)} are about one image."
                " Take --data.split all."
            )
    order = np.random.default_rng(config.seed).permutation(len(wanted))[: config.size]
    return [wanted[int(i)] for i in order]


def _progress(indices: Sequence[int], what: str) -> Iterable[int]:
    """The indices, with a bar if they take long."""
    import datasets

    return datasets.utils.tqdm(indices, desc=what, leave=False, delay=2)  # type: ignore[no-any-return]


def _only(rows: Any, columns: Sequence[str]) -> Any:
    """Rows with these columns alone, so that the others are not read."""
    import datasets

    return rows.select_columns(list(columns)) if isinstance(rows, datasets.Dataset) and columns else rows


def _values(row: Mapping[str, Any], form: Format) -> Iterator[Any]:
    """All images of the row's image columns."""
    for name in form.images:
        value = row[name]
        if isinstance(value, list):
            yield from value
        elif value is not None or len(form.images) == 1:
            yield value


def _digests(texts: Mapping[str, Any], pictures: Mapping[str, Any], form: Format, folder: Path | None) -> list[str]:
    """Of a row's images; a row that cannot be read, or has none, is alone with its texts."""
    try:
        within = form.read(texts).images
    except DataError:
        within = None
    images = list(within or _values(pictures, form))
    return [content_digest(image, folder) for image in images or [dict(texts)]]


def _read(row: Mapping[str, Any], form: Format, config: SourceConfig) -> tuple[ParsedRow, str]:
    parsed = form.read(row)
    task = row.get(config.task)
    if task is not None:
        return parsed, text_of(task, "task")
    return parsed, parsed.task or Path(config.source).stem


def question_of(
    row: Mapping[str, Any], label: str, form: Format, config: SourceConfig, folder: Path | None, places: Counter[str]
) -> dict[str, Any]:
    """A row as `source.load` describes it, its images undecoded.

    Args:
        row: with the columns that it came with.
        label: how the user counts it.
        form: its format.
        config: the options.
        folder: where relative paths of images begin.
        places: counts where images are.

    Raises:
        DataError: naming the row, if it cannot be used.
    """
    try:
        parsed, task = _read(row, form, config)
        images = list(_located(parsed, row, form, folder, places))
        require_places(numbered_places(parsed.prompt, len(images)), len(images))
    except DataError as error:
        raise DataError(f"{label}: {error}") from error
    return {"image": images, **_texts(parsed, task, label)}


def _texts(parsed: ParsedRow, task: str, label: str) -> dict[str, Any]:
    """The columns of a question beside its image."""
    return {
        "prompt": parsed.prompt,
        "answer": parsed.answers[0],
        "task": task,
        "answers": list(parsed.answers),
        "choices": list(parsed.choices),
        ROW: label,
    }


def _images_stay(table: Table, form: Format, chosen: Sequence[int]) -> bool:
    """Whether images are read from the table's own column when they are needed: where it holds them, and not paths."""
    import datasets

    if not isinstance(table.rows, datasets.Dataset) or len(form.images) != 1:
        return False
    feature = table.rows.features[form.images[0]]
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    if not isinstance(inner, datasets.Image):
        return False
    first = next(_values(table.rows[chosen[0]], form), None)
    return first is not None and (first["bytes"] is not None or Path(str(first["path"])).is_absolute())


def _located(
    parsed: ParsedRow, row: Mapping[str, Any], form: Format, folder: Path | None, places: Counter[str]
) -> Iterator[ImageFile]:
    """The row's images; where each is, is counted in `places`."""
    images = list(parsed.images or _values(row, form))
    if not images:
        raise DataError("there is no image, expected one or more.")
    for image in images:
        file, place = located(image, folder)
        places[place] += 1
        yield file


def _data_set(table: Table, form: Format, rows: Sequence[_Row]) -> "datasets.Dataset":
    import datasets

    text, image = datasets.Value("string"), datasets.Image(decode=False)
    features = {
        "prompt": text,
        "answer": text,
        "task": text,
        "answers": datasets.List(text),
        "choices": datasets.List(text),
        ROW: text,
    }
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for row in rows:
        for name, value in _texts(row.parsed, row.task, table.label(row.number)).items():
            columns[name].append(value)
    if not rows or rows[0].images is not None:
        images = [row.images for row in rows]
        return datasets.Dataset.from_dict(
            {"image": images, **columns}, features=datasets.Features({"image": datasets.List(image), **features})
        )
    # Columns are added to the whole table: to a selection of rows, they would copy its images.
    (name,) = form.images
    table_rows = _only(table.rows, [name])
    table_rows = table_rows.rename_column(name, "image") if name != "image" else table_rows
    for added, feature in features.items():
        column: list[Any] = [None] * len(table_rows)
        for row, value in zip(rows, columns[added], strict=True):
            column[row.number] = value
        table_rows = table_rows.add_column(added, column, feature=feature)
    return table_rows.select([row.number for row in rows])


def _unbroken(questions: "datasets.Dataset", broken: list[str]) -> Iterator[int]:
    """Indices of the questions whose images can be read; what is wrong with the others is added to `broken`."""
    for index in _progress(range(len(questions)), "reading images"):
        try:
            read_question(questions[index], index)
            yield index
        except DataError as error:
            broken.append(str(error))


def _description(
    table: Table, form: Format, rows: Sequence[_Row], places: Counter[str], count: int, broken: Sequence[str]
) -> str:
    """How the data were read, in a line."""
    share = "" if table.share.complete else f" ({table.share}{'; --data.split all has every row' * table.unsplit})"
    parts = [
        f"read as: {form.name} ({', '.join((*form.columns, *form.images))})",
        " and ".join(places or [WITHIN]),
        f"{count:,} of {len(table):,} rows{share}",
        form.note([row.parsed for row in rows]),
    ]
    if broken:
        more = f", and {len(broken) - _SHOWN:,} more" if len(broken) > _SHOWN else ""
        parts.append(f"{len(broken):,} broken left out: {'; '.join(broken[:_SHOWN])}{more}")
    return ", ".join(part for part in parts if part)
