"""Pages: images of lines with a printed word and a handwritten number, with four kinds of questions.

A page has 3 to 6 lines, each a three-letter word (in one of several real fonts) and a number of 2 to 4 scanned digits.
The number of lines, offset, scale, spacing, alignment, font, colours, background and noise vary between pages. A page
is a pure function of (split, seed, index).
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import ConfigError
from .digits import SPLITS, digit_scans

if TYPE_CHECKING:
    import datasets

SIDE = 112
"""Width of a page in pixels, and its default height."""
HEIGHTS = {"pages": SIDE, "pages-short": 96, "pages-tall": 128}
"""Page height in pixels by name of the data set. The demo VLM and its capsules are trained on "pages" alone."""
WORDS = tuple(
    "ant ape asp auk bat bee boa cat cod cow dab dog eel elk emu ewe "
    "fly fox gnu hen jay kid koi owl pig pug ram rat sow tit hog yak".split()
)
TASKS = ("transcribe", "line", "lookup", "count")
LINES = (3, 6)
"""Smallest and largest number of lines of a page."""
MAX_DIGITS = 4
COUNTS = (2, 3, 4)
"""Possible answers of a counting question."""
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmss10")
_MARGIN = 3


@dataclass(frozen=True)
class Hand:
    """Ranges of a digit's distortion: turn in degrees, slant in widths per height, stretch and press as log factors."""

    turn: float
    slant: float = 0.0
    stretch: float = 0.0
    press: float = 0.0


_HAND = Hand(turn=7.0)
_TRAIN_HAND = Hand(turn=14.0, slant=0.25, stretch=0.15, press=0.5)
"""Training digits are distorted more than those of other splits, because there are only 1,258 scans."""


@dataclass(frozen=True)
class Mark:
    """One symbol on a page: centre in pixels, text, line (from 0) and column (0: the word, 1 and up: the digits)."""

    x: float
    y: float
    text: str
    line: int
    column: int


@dataclass(frozen=True)
class Page:
    """A rendered page: an RGB image, its lines as (word, number), and the positions of its symbols."""

    image: Image.Image
    lines: tuple[tuple[str, str], ...]
    marks: tuple[Mark, ...]

    @property
    def text(self) -> str:
        return "\n".join(f"{word} {number}" for word, number in self.lines)


@dataclass(frozen=True)
class Question:
    """One question on a page; `task` is one of TASKS."""

    task: str
    prompt: str
    answer: str
    key: str | None = None
    """The key word of a look-up, or the digit of a count."""


def page(split: str, index: int, seed: int = 0, lines: tuple[int, int] = LINES, height: int = SIDE) -> Page:
    """Page number `index` of a split, with `lines` (smallest, largest number) lines; a pure function of the
    arguments."""
    rng = _generator(split, index, seed)
    scans = digit_scans(split)
    words = rng.choice(len(WORDS), size=int(rng.integers(lines[0], lines[1] + 1)), replace=False)
    text = [
        (WORDS[w], "".join(map(str, rng.integers(0, 10, size=int(rng.integers(2, MAX_DIGITS + 1)))))) for w in words
    ]
    ink, marks = _layout(rng, scans, text, _TRAIN_HAND if split == "train" else _HAND, height)
    return Page(_paint(rng, ink), tuple(text), tuple(marks))


def questions(of: Page, rng: np.random.Generator, tasks: tuple[str, ...] = TASKS) -> list[Question]:
    """One question per task, in the order of `tasks`."""
    return [_ASK[task](of, rng) for task in tasks]


def pages(
    split: str, size: int, seed: int = 0, tasks: tuple[str, ...] = TASKS, height: int = SIDE
) -> "datasets.Dataset":
    """Data set of `size` questions, one per page, alternating over the tasks.

    Columns: image (112 wide, `height` high, RGB), prompt, answer, task. Rows depend on split and seed alone: a smaller
    `size` gives the first rows.

    Raises:
        ConfigError: for an unknown split or task.
    """
    import datasets

    unknown = set(tasks) - set(TASKS)
    if unknown or not tasks:
        raise ConfigError(f"unknown tasks {sorted(unknown)}: choose from {', '.join(TASKS)}")

    rows: dict[str, list[Any]] = {"image": [], "prompt": [], "answer": [], "task": []}
    for index in range(size):
        drawn = page(split, index, seed, height=height)
        (question,) = questions(drawn, _generator(split, index, seed, stream=1), (tasks[index % len(tasks)],))
        for column, value in zip(rows, (drawn.image, question.prompt, question.answer, question.task), strict=True):
            rows[column].append(value)
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "prompt": text, "answer": text, "task": text})
    return datasets.Dataset.from_dict(rows, features=features)


def _generator(split: str, index: int, seed: int, stream: int = 0) -> np.random.Generator:
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def _ask_transcribe(of: Page, rng: np.random.Generator) -> Question:
    return Question("transcribe", "Transcribe the page.", of.text)


def _ask_line(of: Page, rng: np.random.Generator) -> Question:
    k = int(rng.integers(len(of.lines)))
    return Question("line", f"Read line {k + 1}.", " ".join(of.lines[k]))


def _ask_lookup(of: Page, rng: np.random.Generator) -> Question:
    """Look-up of a number by its word. The answer lists the words down to the key word, then its number, so the search
    is spelled out."""
    k = int(rng.integers(len(of.lines)))
    words = [word for word, _ in of.lines[: k + 1]]
    return Question("lookup", f"What stands beside {words[-1]}?", "\n".join(words) + f" {of.lines[k][1]}", words[-1])


def _ask_count(of: Page, rng: np.random.Generator) -> Question:
    """Count of a digit. The answer repeats the numbers with a running tally behind every occurrence, then the count, so
    the counting is spelled out.

    The digit occurs 2 to 4 times, with equal probability for each count that the page has; a page without such a digit
    gets one that occurs more or less often.
    """
    numbers = [number for _, number in of.lines]
    counts = Counter("".join(numbers))
    some = sorted({n for n in counts.values() if n in COUNTS}) or sorted(set(counts.values()))
    wanted = some[int(rng.integers(len(some)))]
    digits = sorted(digit for digit, n in counts.items() if n == wanted)
    digit = digits[int(rng.integers(len(digits)))]
    tally = count(1)
    aloud = ["".join(f"{d}({next(tally)})" if d == digit else d for d in number) for number in numbers]
    return Question("count", f"How many {digit}s?", "\n".join([*aloud, str(wanted)]), digit)


_ASK = {"transcribe": _ask_transcribe, "line": _ask_line, "lookup": _ask_lookup, "count": _ask_count}


def _layout(
    rng: np.random.Generator, scans: Any, lines: list[tuple[str, str]], hand: Hand, page_height: int
) -> tuple[NDArray[np.float32], list[Mark]]:
    """Ink coverage [page_height, SIDE] in 0..1 of the typeset lines, and the positions of the symbols."""
    width, down = SIDE - 2 * _MARGIN, page_height - 2 * _MARGIN
    height = rng.uniform(10.5, 13.5)
    pitch = rng.uniform(height + 2, max(height + 2, min(height + 8, down / len(lines))))
    font = _FONTS[int(rng.integers(len(_FONTS)))]
    size = round(height * rng.uniform(0.95, 1.15))
    masks = [_word_mask(font, size, word) for word, _ in lines]
    widest, longest = max(m.shape[1] for m in masks), max(len(number) for _, number in lines)
    advance = rng.uniform(max(8.6, height * 0.8), height + 1.5)
    gap = rng.uniform(3, 10)
    slack = width - (widest + gap + longest * advance)
    if slack < 0:
        advance, gap = max(8.6, advance + (slack - 1) / longest), 3.0
        slack = max(0.0, width - (widest + gap + longest * advance))
    left = _MARGIN + rng.uniform(0, slack)
    top = _MARGIN + rng.uniform(0, max(0.0, down - pitch * len(lines)))
    aligned = rng.random() < 0.5
    ink = np.zeros((page_height, SIDE), np.float32)
    marks = []
    for i, ((word, number), mask) in enumerate(zip(lines, masks, strict=True)):
        centre = top + pitch * (i + 0.5)
        x = left + (0 if aligned else rng.uniform(-1.5, 1.5))
        _stamp(ink, mask, x, centre - mask.shape[0] / 2)
        marks.append(Mark(x + mask.shape[1] / 2, centre, word, i, 0))
        x += (widest if aligned else mask.shape[1]) + gap
        for j, digit in enumerate(number):
            choices = scans[int(digit)]
            scan = choices[int(rng.integers(len(choices)))]
            y = centre + rng.uniform(-1, 1)
            drawn = _digit_mask(rng, scan, height * rng.uniform(0.95, 1.08), hand)
            _stamp(ink, drawn, x + advance / 2 - drawn.shape[1] / 2, y - drawn.shape[0] / 2)
            marks.append(Mark(x + advance / 2, y, digit, i, j + 1))
            x += advance
    return ink, marks


@cache
def _word_mask(font: str, size: int, word: str) -> NDArray[np.float32]:
    """Ink coverage of a word, cropped to its width; its height is the font's line height, so words share a baseline."""
    import matplotlib

    face = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"), size)
    left, _, right, _ = face.getbbox(word)
    canvas = Image.new("L", (int(right - left) + 1, int(size * 1.3)), 0)
    ImageDraw.Draw(canvas).text((-left, canvas.height * 0.78), word, fill=255, font=face, anchor="ls")
    return np.asarray(canvas, np.float32) / np.float32(255)


def _digit_mask(rng: np.random.Generator, scan: NDArray[np.float32], height: float, hand: Hand) -> NDArray[np.float32]:
    """Ink coverage of one digit, rotated, and slanted, stretched and pressed harder or softer within the hand's
    ranges."""
    degrees = rng.uniform(-hand.turn, hand.turn)
    width = height * 0.9
    if hand.stretch:
        width *= np.exp(rng.uniform(-hand.stretch, hand.stretch))
        scan = scan ** np.exp(rng.uniform(-hand.press, hand.press))
    image = Image.fromarray((scan * 255).astype(np.uint8)).resize(
        (max(6, round(width)), round(height)), Image.Resampling.BICUBIC
    )
    if hand.slant:
        slant = rng.uniform(-hand.slant, hand.slant)
        shear = (1, slant, -slant * image.height / 2, 0, 1, 0)
        image = image.transform(image.size, Image.Transform.AFFINE, shear, Image.Resampling.BICUBIC)
    return np.asarray(image.rotate(degrees, Image.Resampling.BICUBIC), np.float32) / np.float32(255)


def _stamp(ink: NDArray[np.float32], mask: NDArray[np.float32], x: float, y: float) -> None:
    """Draw a mask on the page, clipped at the page's edges."""
    x0, y0 = round(x), round(y)
    height, width = mask.shape
    top, left = max(0, -y0), max(0, -x0)
    bottom, right = min(height, ink.shape[0] - y0), min(width, ink.shape[1] - x0)
    if bottom > top and right > left:
        target = ink[y0 + top : y0 + bottom, x0 + left : x0 + right]
        np.maximum(target, mask[top:bottom, left:right], out=target)


def _paint(rng: np.random.Generator, ink: NDArray[np.float32]) -> Image.Image:
    """Colour ink and paper, with a brightness gradient across the page and noise."""
    paper, pen = rng.uniform(170, 240) + rng.uniform(-15, 15, 3), rng.uniform(0, 60) + rng.uniform(0, 40, 3)
    down, across = (np.linspace(-0.5, 0.5, n) for n in ink.shape)
    shade = down[:, None] * rng.uniform(-40, 40) + across[None, :] * rng.uniform(-40, 40)
    colours = ink[..., None] * pen + (1 - ink[..., None]) * (paper + shade[..., None])
    colours += rng.normal(0, rng.uniform(0, 8), (*ink.shape, 1))
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
