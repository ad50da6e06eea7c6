"""Emoji scenes: one to nine emoji on a photograph, with questions on which emoji there are, where and how many.

Glyphs are Noto Color Emoji's (Debian's fonts-noto-color-emoji); names are Unicode's, in lower case, of one or two
words. A scene is a pure function of (split, seed, index); scenes of different splits have different photographs.
"""

import io
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import PackageError
from .packages import COLOR_EMOJI
from .pages import Question
from .photos import background, photos
from .picture import Picture, Thing, data_set, generator

if TYPE_CHECKING:
    import datasets

SIDE = 224
"""Height and width of a scene in pixels."""
CHARACTERS = (
    "🐶🐱🐭🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐦🐤🦆🦉🐴🦄🐝🦋🐌🐞🐢🐍🐙🦀🐠🐬🐘🦔🦇🦈🍎🍐🍊🍋🍌🍉🍇🍓🍒🍑🍍🍅🍆🥕🍄🍞🧀🍔🌭🍩🍪🎂🍺🥚"
    "⚽🏈⚾🎱🎸🎺🎻🚗🚕🚌🚑🚒🚜🚲🚀🚁⛵📱💻📷🔑🔒🔨📕🎁🎈🌙☁🔥🌈🌵🌲🌻🌹🍁👑👟👕🎩☂🔔💎🏆⌚⚓🧸🧦🧤🎃👻💀❄🎲🪑🚪📚✏⏰👂👀🦴"
)
NAMES = {character: unicodedata.name(character).lower() for character in CHARACTERS}
PLACES = (
    "top left",
    "top centre",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom centre",
    "bottom right",
)
TASKS = ("place", "number", "list")
_FONT_FILE = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
_FONT_SIZE = 109
"""The only size of the font's bitmaps."""
_SIZES = (46, 72)
"""Range of an emoji's longer side in pixels; a grid cell is a third of the scene, 74 pixels."""
_TURN = 15.0
_STREAM = 2

Glyph = Callable[[str], Image.Image]
"""Maps a character to its picture, RGBA, cropped."""


@cache
def glyph(character: str) -> Image.Image:
    """Picture of an emoji.

    Raises:
        PackageError: if the font cannot be fetched.
    """
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), character, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no picture of {character!r} ({NAMES.get(character)}).")
    return canvas.crop(box)


def scene(split: str, index: int, seed: int = 0) -> Picture:
    """Scene number `index` of a split."""
    return compose(generator(split, index, seed, _STREAM), photos(split), glyph)


def emoji(split: str, size: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> "datasets.Dataset":
    """Data set of `size` questions, one per scene, alternating over the tasks; columns image, prompt, answer, task."""
    return data_set(scene, split, size, seed, tasks)


def compose(
    rng: np.random.Generator, backgrounds: tuple[Image.Image, ...], picture: Glyph, names: dict[str, str] | None = None
) -> Picture:
    """Draw a scene of 1 to 9 emoji in the cells of a 3 x 3 grid, with questions on every occupied cell, some counts,
    and the list of all emoji.

    Args:
        rng: the only source of randomness.
        backgrounds: photographs.
        picture: maps a character to its picture.
        names: names by character; NAMES by default.
    """
    names = names or NAMES
    image = background(rng, backgrounds, SIDE)
    total = int(rng.integers(1, len(PLACES) + 1))
    kinds = rng.choice(list(names), size=min(len(names), int(rng.integers(1, total + 1))), replace=False)
    chosen = [str(k) for k in rng.permutation([*kinds, *rng.choice(kinds, size=total - len(kinds))])]
    cells = sorted(int(c) for c in rng.choice(len(PLACES), size=total, replace=False))
    things = [
        _paste(rng, image, picture(character), cell, names[character])
        for character, cell in zip(chosen, cells, strict=True)
    ]
    questions = [
        Question("place", f"What is at the {PLACES[cell]}?", names[c]) for c, cell in zip(chosen, cells, strict=True)
    ]
    counts = Counter(chosen)
    absent = [c for c in names if c not in counts]
    questions += [
        Question("number", f"How many times is there a picture of: {names[c]}?", str(n)) for c, n in counts.items()
    ]
    if absent:
        questions.append(
            Question(
                "number", f"How many times is there a picture of: {names[absent[int(rng.integers(len(absent)))]]}?", "0"
            )
        )
    questions.append(Question("list", "List all pictures, row by row.", ", ".join(names[c] for c in chosen)))
    return Picture(image, tuple(things), tuple(questions))


def _paste(rng: np.random.Generator, image: Image.Image, drawn: Image.Image, cell: int, name: str) -> Thing:
    """Draw one emoji into its cell, slightly rotated and shifted."""
    size = rng.uniform(*_SIZES)
    factor = size / max(drawn.size)
    small = drawn.resize(
        (max(1, round(drawn.width * factor)), max(1, round(drawn.height * factor))), Image.Resampling.LANCZOS
    )
    small = small.rotate(rng.uniform(-_TURN, _TURN), Image.Resampling.BICUBIC, expand=True)
    pitch = SIDE / 3
    row, column = divmod(cell, 3)
    slack = max(0.0, pitch - size) / 2
    x, y = ((at + 0.5) * pitch + rng.uniform(-slack, slack) for at in (column, row))
    left = round(min(max(0.0, x - small.width / 2), SIDE - small.width))
    top = round(min(max(0.0, y - small.height / 2), SIDE - small.height))
    image.paste(small, (left, top), small)
    return Thing(name, left, top, left + small.width, top + small.height)


@cache
def _font() -> ImageFont.FreeTypeFont:
    archive = COLOR_EMOJI.path()
    with tarfile.open(fileobj=io.BytesIO(_member(archive.read_bytes(), "data.tar.xz"))) as data:
        font = data.extractfile(f"./{_FONT_FILE}")
        if font is None:
            raise PackageError(f"{archive} holds no {_FONT_FILE}.")
        return ImageFont.truetype(io.BytesIO(font.read()), _FONT_SIZE)


def _member(archive: bytes, name: str) -> bytes:
    """One file of a Debian package (an ar archive: a magic line, then entries of a 60-byte header and contents padded
    to an even length)."""
    at = 8
    while at < len(archive):
        size = int(archive[at + 48 : at + 58])
        if archive[at : at + 16].decode().strip().rstrip("/") == name:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise PackageError(f"the Debian package holds no {name}.")
