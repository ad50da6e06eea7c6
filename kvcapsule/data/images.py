"""The one reader of images: train, eval, analyze and generate see every file as it is meant to be seen, in RGB.

Like transformers and `datasets`, it turns photographs upright (EXIF). Beyond them, transparency is composited on white,
16-bit greyscale is scaled to 8 bits, and an image that cannot be read is one sentence.
"""

import base64
import binascii
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError

DATA_URI = "data:image/"
"""Begins an image that is written out in base64 within the data."""
_SIXTEEN_BITS = 65535
_URLS = ("http://", "https://", "ftp://", "s3://", "gs://")


def open_image(path: str | Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        DataError: if there is no such file, if it is no image, damaged or too large, or if `path` is a URL.
    """
    refuse_url(str(path))
    try:
        with open(path, "rb") as file:
            return _read(file, str(path))
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image ({error.strerror}): give an image file.") from error


def images_of(row: Mapping[str, Any], label: str) -> list[Image.Image]:
    """The images of a row as RGB; label: the row, for messages.

    Raises:
        DataError: naming the row, if there is no image or one cannot be read.
    """
    values = row["image"] if isinstance(row["image"], list) else [row["image"]]
    try:
        return [_decode(value) for value in values]
    except DataError as error:
        raise DataError(f"{label}: {error}") from error


def refuse_url(name: str) -> None:
    """Raises DataError if an image is named by a URL."""
    if name.startswith(_URLS):
        raise DataError(f"the image {name} is a URL: download it first, images are read from files.")


def _decode(value: Any) -> Image.Image:
    """An image of `datasets`, decoded (built-in sources) or as its bytes or the path of a file."""
    if isinstance(value, Image.Image):
        return upright_rgb(value)
    if not isinstance(value, dict):
        raise DataError(f"the image is missing: the column holds {type(value).__name__}, expected an image or a list.")
    path = value.get("path")
    if value.get("bytes") is not None:
        return _read(BytesIO(value["bytes"]), path or "the image")
    if path is None:
        raise DataError("the image is missing (null).")
    if path.startswith(DATA_URI):
        return _read(BytesIO(base64_bytes(path)), "the image in base64")
    return open_image(path)


def base64_bytes(uri: str) -> bytes:
    """The bytes of a data URI. Raises DataError if they are damaged."""
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image is no sound base64 ({error}).") from error


def _read(file: IO[bytes], name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Below twice Pillow's limit, where it refuses an image, it warns.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return upright_rgb(image)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large to be read ({error}): make it smaller.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} cannot be read as an image: it is none, or of an unknown kind.") from error
    # Pillow's decoders raise errors of many kinds on damaged files.
    except Exception as error:
        raise DataError(
            f"{name} cannot be read as an image ({' '.join(str(error).split())}): give a complete PNG, JPEG, WebP, ..."
            " file."
        ) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """The first frame, turned as its EXIF data say, on white, with 8 bits a channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers: save it with 8 or 16 bits a channel.")
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image).astype(np.int64), 0, _SIXTEEN_BITS)
        image = Image.fromarray((levels / (_SIXTEEN_BITS / 255)).round().astype(np.uint8))
    elif "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")
