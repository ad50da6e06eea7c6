"""Background photographs from scikit-image's wheel and scikit-learn, split into disjoint train, validation and test
photographs."""

from functools import cache

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .digits import SPLITS
from .packages import SCIKIT_IMAGE

PHOTOS = {
    "train": (
        "astronaut.png",
        "coffee.png",
        "motorcycle_left.png",
        "hubble_deep_field.jpg",
        "brick.png",
        "coins.png",
        "china.jpg",
    ),
    "validation": ("gravel.png", "flower.jpg"),
    "test": ("chelsea.png", "rocket.jpg", "camera.png", "grass.png"),
}
_SCIKIT_LEARN = ("china.jpg", "flower.jpg")
_ZOOM = (0.3, 1.0)
"""Range of the share of a photograph's shorter side that a background shows."""


@cache
def photos(split: str) -> tuple[Image.Image, ...]:
    """Photographs of one split, RGB.

    Raises:
        ConfigError: for an unknown split.
        PackageError: if scikit-image's wheel cannot be fetched.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    from sklearn.datasets import load_sample_image

    folder = SCIKIT_IMAGE.extracted() / "skimage" / "data"
    images = []
    for name in PHOTOS[split]:
        opened = Image.fromarray(load_sample_image(name)) if name in _SCIKIT_LEARN else Image.open(folder / name)
        images.append(opened.convert("RGB"))
    return tuple(images)


def background(rng: np.random.Generator, of: tuple[Image.Image, ...], side: int) -> Image.Image:
    """Random square crop of one photograph, resized to `side`, with random mirroring and brightness."""
    photo = of[int(rng.integers(len(of)))]
    cut = int(min(photo.size) * rng.uniform(*_ZOOM))
    left, top = (int(rng.integers(0, length - cut + 1)) for length in photo.size)
    image = photo.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + cut, top + cut))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, lift = rng.uniform(0.6, 1.1), rng.uniform(0, 60)
    return image.point([min(255, round(gain * value + lift)) for value in range(256)] * 3)
