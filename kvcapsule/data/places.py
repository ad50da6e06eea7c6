"""Where images stand within a prompt."""

import re

from ..errors import DataError

IMAGE = "<image>"
"""The place of an image in a prompt; without one, the images stand before the prompt."""
_NUMBERED = re.compile(r"<image (\d+)>")
_PLACE = re.compile(rf"[ \t]*\n?{IMAGE}\n?[ \t]*")


def pieces(prompt: str) -> list[str]:
    """The texts before, between and behind the places of images; a newline beside a place belongs to it."""
    return _PLACE.split(prompt)


def leading_dropped(prompt: str) -> str:
    """The prompt without its places, where all of them are at its beginning: there the images stand anyway."""
    *before, text = pieces(prompt)
    return prompt if any(before) else text


def words_alone(prompt: str) -> str:
    """The prompt without places."""
    return " ".join(piece for piece in pieces(prompt) if piece)


def require_places(prompt: str, images: int) -> None:
    """Raises DataError if a prompt has places, but not for as many images as there are."""
    places = len(pieces(prompt)) - 1
    if places not in (0, images):
        raise DataError(f"the prompt has {places} places {IMAGE}, but there are {images} images.")


def numbered_places(prompt: str, images: int) -> str:
    """MMMU's <image 1>, <image 2>, ... as places where they name each image once and in order; else as words."""
    in_order = [int(number) for number in _NUMBERED.findall(prompt)] == list(range(1, images + 1))
    return _NUMBERED.sub(IMAGE if in_order else r"(image \1)", prompt)
