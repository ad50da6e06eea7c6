"""Images that rows name by paths: where they lie, and what their content is."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from ..errors import DataError
from .images import DATA_URI, refuse_url

_BASE64 = {"iVBORw0KGgo": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}
"""How images in base64 begin, and their types."""
BESIDE, WORKING, WITHIN = "images beside the file", "images in the working directory", "images in the data"
_DIGEST = 16
_LONGEST = 1_000
"""Letters of a name that may be a path."""


class ImageFile(TypedDict):
    """An image as `datasets` stores it undecoded; one of the two is None, or the path only a name."""

    bytes: bytes | None
    path: str | None


def located(value: Any, folder: Path | None) -> tuple[ImageFile, str]:
    """An image that a row names or holds, and where it is: BESIDE, WORKING or WITHIN.

    Args:
        value: a path, base64, bytes, or an object with bytes and path.
        folder: of the data file, where a relative path is looked for first; then in the working directory.

    Raises:
        DataError: if there is no such file, or no image in the value; the caller names the row.
    """
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        if isinstance(value.get("bytes"), bytes):
            return ImageFile(bytes=value["bytes"], path=value.get("path")), WITHIN
        value = value.get("path")
    if isinstance(value, bytes):
        return ImageFile(bytes=value, path=None), WITHIN
    if value is None or value == "":
        raise DataError("the image is missing, expected a path or an image.")
    if not isinstance(value, str):
        raise DataError(f"the image column holds {type(value).__name__}, expected a path, an image, or a list of them.")
    kind = next((kind for begin, kind in _BASE64.items() if value.startswith(begin)), None)
    if kind is not None and not Path(value[:200]).suffix:
        value = f"{DATA_URI}{kind};base64,{value}"
    if value.startswith(DATA_URI):
        return ImageFile(bytes=None, path=value), WITHIN
    refuse_url(value)
    path, place = _on_disk(value, folder)
    return ImageFile(bytes=None, path=str(path)), place


def _on_disk(name: str, folder: Path | None) -> tuple[Path, str]:
    beside = None if folder is None else folder / name
    # Unlike Path.is_file, it is no error for what cannot be a name.
    if beside is not None and os.path.isfile(beside):
        return beside, BESIDE
    if os.path.isfile(name):
        return Path(name), WORKING
    tried = (
        ""
        if beside is None or Path(name).is_absolute()
        else f", beside the data ({beside}) or in the working directory"
    )
    if len(name) > _LONGEST:
        raise DataError(f"there is no image {name[:_LONGEST]}..., and it is no base64 of a PNG, JPEG, GIF or WebP.")
    raise DataError(f"there is no image {name}{tried}.")


def content_digest(image: Any, folder: Path | None) -> str:
    """A digest of an image's file; of its name, where there is no such file."""
    try:
        file, _ = located(image, folder)
        content = file["bytes"]
        if content is None:
            path = str(file["path"])
            content = path.encode() if path.startswith(DATA_URI) else Path(path).read_bytes()
    except (DataError, OSError):
        content = repr(image).encode()
    return hashlib.blake2b(content, digest_size=_DIGEST).hexdigest()
