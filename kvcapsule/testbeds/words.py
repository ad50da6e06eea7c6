"""Words to read: one to four common words in real fonts on a photograph.

A picture is a pure function of (split, seed, index); pictures of different splits have different photographs.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .pages import Question
from .photos import background, photos
from .picture import Picture, Thing, data_set, generator

if TYPE_CHECKING:
    import datasets

SIDE = 224
TASKS = ("read", "line")
LINES = (1, 4)
WORDS = tuple(
    "able air arm art bag ball bank bed bell bird blue boat body book box boy bread bridge bus cake car card chair city"
    " class clock cloud coat coffee cold color corn cow cup dance day desk dog door dream dress drink earth egg eye"
    " face farm fire fish floor flower food foot forest fruit game garden gate girl glass gold grass green hair hand"
    " hat heart hill home horse hotel house ice island jacket key kitchen lake lamp leaf leg letter light lion lunch"
    " map market milk money moon mountain mouth music name night north ocean office orange paint paper park party pen"
    " phone photo piano picture plane plant plate pocket pool queen radio rain red river road rock room rose salt sand"
    " school sea shirt shoe shop silver sister snow song south spoon spring star station stone storm street sugar"
    " summer sun table tail tea tiger time town train tree uncle valley village voice wall watch water west wheel wind"
    " window winter wolf wood yard year".split()
)
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral")
_SIZES = (30.0, 44.0)
_ORDINALS = ("first", "second", "third", "fourth")
_STREAM = 4


def sign(split: str, index: int, seed: int = 0) -> Picture:
    """Picture number `index` of a split."""
    return compose(generator(split, index, seed, _STREAM), photos(split))


def words(split: str, size: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> "datasets.Dataset":
    """Data set of `size` questions, one per picture, alternating over the tasks; columns image, prompt, answer,
    task."""
    return data_set(sign, split, size, seed, tasks)


def compose(rng: np.random.Generator, backgrounds: tuple[Image.Image, ...]) -> Picture:
    """Draw 1 to 4 words, one below the other, with questions for all words and for single lines.

    Args:
        rng: the only source of randomness.
        backgrounds: photographs.
    """
    image = background(rng, backgrounds, SIDE)
    chosen = [str(w) for w in rng.choice(WORDS, size=int(rng.integers(LINES[0], LINES[1] + 1)), replace=False)]
    face = _face(_FONTS[int(rng.integers(len(_FONTS)))], round(rng.uniform(*_SIZES)))
    dark, light = tuple(rng.integers(0, 70, 3).tolist()), tuple(rng.integers(190, 256, 3).tolist())
    ink, board = (dark, light) if rng.random() < 0.5 else (light, dark)
    boxes = [face.getbbox(word) for word in chosen]
    pitch = rng.uniform(50, SIDE / len(chosen)) if len(chosen) < 4 else SIDE / 4
    top = rng.uniform(0, SIDE - pitch * len(chosen))
    draw = ImageDraw.Draw(image)
    things = []
    for i, (word, (left, up, right, down)) in enumerate(zip(chosen, boxes, strict=True)):
        width, height = right - left, down - up
        x = rng.uniform(6, max(6.0, SIDE - 6 - width))
        y = top + pitch * i + (pitch - height) / 2
        draw.rounded_rectangle((x - 5, y - 4, x + width + 5, y + height + 4), 4, fill=board)
        draw.text((x - left, y - up), word, fill=ink, font=face)
        things.append(Thing(word, x, y, x + width, y + height))
    questions = [Question("read", "Read the words.", "\n".join(chosen))]
    questions += [Question("line", f"What is the {_ORDINALS[i]} word?", word) for i, word in enumerate(chosen)]
    return Picture(image, tuple(things), tuple(questions))


def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"), size)
