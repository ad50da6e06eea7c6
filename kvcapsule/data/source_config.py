"""The options that say where questions come from."""

from dataclasses import dataclass

PAGES = "pages"
"""The default source; kvcapsule.testbeds.pages.HEIGHTS names those with pages of other heights."""


@dataclass(frozen=True)
class SourceConfig:
    """Where questions come from; docs/data.md has an example of each form of data."""

    source: str = PAGES
    """Source of the questions: pages, pages-short or pages-tall (built in); emoji, easy-vqa, words, or pictures, which
    is all three (fetched as packages); a json, jsonl, csv, tsv or parquet file; a folder saved by `datasets`; a folder
    of images with metadata; a folder of data files; or a data set on the Hub."""
    split: str = "train"
    """Split of the source, or a share of one by image content, such as train[:80%]. Built-in sources have train,
    validation and test. Of a source without splits, such as a file, train is the first 90 % of the images, test the
    rest, and all is all."""
    size: int = 10_000
    """Most questions to use."""
    seed: int = 0
    """Random seed of the pages or pictures; for other sources, of the order of the rows."""
    image: str = "image"
    """Name of the column with the image, or with a list of images. Default: image, images, or image_1, image_2, ..."""
    prompt: str = "prompt"
    """Name of the column with the question. Default: prompt, question or query."""
    answer: str = "answer"
    """Name of the column with the right answer, or with all accepted answers. Default: answer or answers."""
    task: str = "task"
    """Name of the column with the kind of question; without such a column, all questions are of one kind."""
    subset: str | None = None
    """Configuration of a data set that has several, such as the subsets of the_cauldron."""
    streaming: bool = False
    """Read at most --data.size rows one after the other, of a data set on the Hub without downloading all of it; they
    are shuffled within a buffer. train reads them as its steps take them, and holds out the first ones; other commands
    hold them in memory. For whole splits; of a source without splits, such as a file, for all of it."""
    format: str | None = None
    """How the columns are read: question-answer, question-answers, multiple-choice, llava, messages or cauldron.
    Default: recognised by the columns and the first row."""
    skip_broken: bool = False
    """Leave out rows that cannot be read, and say how many. All images are read once before the run. false: the first
    such row is an error."""
