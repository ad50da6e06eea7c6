"""Any source of image, prompt and answer: the built-in ones, or whatever `datasets` can load."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import DataError, PackageError
from ..testbeds import easy_vqa, emoji, pages, words
from ..testbeds.digits import SPLITS

# `datasets` comes with the extras [train] and [eval]; reading an image file (`kvcapsule generate`) needs none of it.
if TYPE_CHECKING:
    import datasets

PAGES = "pages"
"""The name of the source that is taken by default; pages of other heights are called as
kvcapsule.testbeds.pages.HEIGHTS has them."""
PICTURES: dict[str, "Callable[[str, int, int], datasets.Dataset]"] = {
    "emoji": emoji.emoji,
    "easy-vqa": easy_vqa.easy_vqa,
    "words": words.words,
}
"""The sources of smol-vlm, by name: (split, size, seed) to a data set. They are fetched as packages when first asked
for."""
MIXED = "pictures"
"""The name of these three, a question of each in turn; its tasks have the source in front: emoji-place."""
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class SourceConfig:
    """Where questions come from."""

    source: str = PAGES
    """"pages" (built in; "pages-short" and "pages-tall" have other heights), "emoji", "easy-vqa" or "words" (fetched as
    packages; "pictures" is all three in turn), a folder saved by `datasets`, a json, csv or parquet file, a folder of
    images with metadata, one on the Hub."""
    split: str = "train"
    """Split of the source; the built-in ones have train, validation and test."""
    size: int = 10_000
    """Questions that are taken, at most."""
    seed: int = 0
    """Which pages or pictures are drawn; for other sources, how rows are shuffled."""
    image: str = "image"
    """Column with the image, or with a list of images."""
    prompt: str = "prompt"
    """Column with the question."""
    answer: str = "answer"
    """Column with the right answer."""
    task: str = "task"
    """Column that names the kind of question; where the source has none, all are of one kind."""


def load(config: SourceConfig) -> "datasets.Dataset":
    """A data set with the columns image, prompt, answer and task, at most `size` rows.

    Raises:
        DataError: if the source is not found, has not the split, or lacks a column; the message names what there is.
    """
    import datasets

    if config.size < 1:
        raise DataError(f"data size {config.size}: at least one question is needed.")
    if config.source in pages.HEIGHTS:
        if config.split not in SPLITS:
            raise DataError(f"{config.source} has no split {config.split!r}; it has {', '.join(SPLITS)}.")
        return pages.pages(config.split, config.size, config.seed, height=pages.HEIGHTS[config.source])
    if config.source in (*PICTURES, MIXED):
        return _pictures(config)
    found = _open(config)
    wanted = {config.image: "image", config.prompt: "prompt", config.answer: "answer"}
    missing = [column for column in wanted if column not in found.column_names]
    if missing:
        raise DataError(
            f"{config.source} has no column {', '.join(map(repr, missing))}; it has {', '.join(found.column_names)}. "
            "Name the right ones with --data.image, --data.prompt and --data.answer."
        )
    if config.task in found.column_names:
        wanted[config.task] = "task"
    else:
        found = found.add_column("task", [Path(config.source).stem] * len(found))
        wanted["task"] = "task"
    found = found.select_columns(list(wanted)).rename_columns({old: new for old, new in wanted.items() if old != new})
    found = found.shuffle(seed=config.seed).select(range(min(config.size, len(found))))
    # Undecoded, so that an image that cannot be read is met where its row can be named.
    one = datasets.Image(decode=False)
    feature = found.features["image"]
    several = isinstance(feature, (datasets.List, datasets.LargeList))
    return found.cast_column("image", datasets.List(one) if several else one)


def _pictures(config: SourceConfig) -> "datasets.Dataset":
    import datasets

    if config.split not in SPLITS:
        raise DataError(f"{config.source} has no split {config.split!r}; it has {', '.join(SPLITS)}.")
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
    """The rows, their tasks named after the source too."""
    tasks = [f"{name}-{task}" for task in rows["task"]]
    return rows.remove_columns("task").add_column("task", tasks, feature=rows.features["task"])


def images_of(row: dict[str, Any], index: int) -> list[Image.Image]:
    """The images of a row as RGB.

    Raises:
        DataError: naming the row, if an image cannot be read.
    """
    held = row["image"] if isinstance(row["image"], list) else [row["image"]]
    images = []
    for image in held:
        if isinstance(image, dict):
            image = _decode(image, index)
        if not isinstance(image, Image.Image):
            raise DataError(
                f"row {index}: the image column holds {type(image).__name__}, expected an image (or a list of them)."
            )
        images.append(image.convert("RGB"))
    return images


def open_image(path: str | Path) -> Image.Image:
    """Read an image file.

    Raises:
        DataError: if there is no such file or it is no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}.") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}): give a PNG, JPEG, WebP, ... that is whole."
        ) from error


def _decode(image: dict[str, Any], index: int) -> Image.Image:
    """An undecoded image of `datasets`: bytes, or the path of a file."""
    try:
        if image.get("bytes") is None:
            return open_image(image["path"])
        return Image.open(BytesIO(image["bytes"]))
    except DataError as error:
        raise DataError(f"row {index}: {error}") from error
    except OSError as error:
        raise DataError(
            f"row {index}: {image.get('path') or 'the image'} cannot be read as an image ({error})."
        ) from error


def _open(config: SourceConfig) -> "datasets.Dataset":
    import datasets

    path = Path(config.source)
    try:
        if path.is_file():
            builder = _BUILDERS.get(path.suffix)
            if builder is None:
                raise DataError(
                    f"{path}: data files end in {', '.join(_BUILDERS)}; for a folder of images, name the folder."
                )
            return datasets.load_dataset(builder, data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))[config.split]
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=config.split)
        return datasets.load_dataset(config.source, split=config.split)
    except DataError:
        raise
    except (
        FileNotFoundError,
        ConnectionError,
        LookupError,
        ValueError,
        OSError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(f"cannot load data from {config.source!r} (split {config.split!r}): {error}") from error
