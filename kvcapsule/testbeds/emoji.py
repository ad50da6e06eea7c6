"""Emoji scenes: one to nine emoji on a photograph, which is where and how many there are.

The pictures are Noto Color Emoji's (Debian's fonts-noto-color-emoji), the names Unicode's, in lower case, of one or two
words. A scene is a pure function of (split, seed, index); scenes of different splits stand on different photographs.
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
"""Pixels of a scene, each way."""
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
"""The one size that the font has pictures of."""
_SIZES = (46, 72)
"""Least and most pixels of an emoji's longer side; a third of the scene is 74."""
_TURN = 15.0
_STREAM = 2

Glyph = Callable[[str], Image.Image]
"""A character's picture, RGBA, cut to what it shows."""


@cache
def glyph(character: str) -> Image.Image:
    """The picture of an emoji.

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
    """The scene number `index` of a split."""
    return compose(generator(split, index, seed, _STREAM), photos(split), glyph)


def emoji(split: str, size: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> "datasets.Dataset":
    """`size` questions on a scene each, the tasks in turn; columns image, prompt, answer, task."""
    return data_set(scene, split, size, seed, tasks)


def compose(
    rng: np.random.Generator, backgrounds: tuple[Image.Image, ...], picture: Glyph, names: dict[str, str] | None = None
) -> Picture:
    """A scene of 1 to 9 emoji in the cells of a 3 x 3 grid, and its questions: every place that is taken, some numbers,
    and the list.

    Args:
        rng: decides everything.
        backgrounds: photographs.
        picture: gives a character's picture.
        names: characters and what they are called; NAMES by default.
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
    asked = [
        Question("place", f"What is at the {PLACES[cell]}?", names[c]) for c, cell in zip(chosen, cells, strict=True)
    ]
    counts = Counter(chosen)
    absent = [c for c in names if c not in counts]
    asked += [
        Question("number", f"How many times is there a picture of: {names[c]}?", str(n)) for c, n in counts.items()
    ]
    if absent:
        asked.append(
            Question(
                "number", f"How many times is there a picture of: {names[absent[int(rng.integers(len(absent)))]]}?", "0"
            )
        )
    asked.append(Question("list", "List all pictures, row by row.", ", ".join(names[c] for c in chosen)))
    return Picture(image, tuple(things), tuple(asked))


def _paste(rng: np.random.Generator, image: Image.Image, drawn: Image.Image, cell: int, name: str) -> Thing:
    """Draw one emoji into its cell, turned a little, somewhere near the middle."""
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
        held = data.extractfile(f"./{_FONT_FILE}")
        if held is None:
            raise PackageError(f"{archive} holds no {_FONT_FILE}.")
        return ImageFont.truetype(io.BytesIO(held.read()), _FONT_SIZE)


def _member(archive: bytes, name: str) -> bytes:
    """One file of a Debian package: an ar archive, a magic line, then entries of a 60-byte header and their bytes,
    padded to two."""
    at = 8
    while at < len(archive):
        size = int(archive[at + 48 : at + 58])
        if archive[at : at + 16].decode().strip().rstrip("/") == name:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise PackageError(f"the Debian package holds no {name}.")
