"""The digest of a question: equal for the same pictures and text, whatever file, format or split they come from."""

import hashlib
from collections.abc import Sequence

from PIL import Image

from .batches import Question

BYTES = 8
"""Two of a million different questions have the same digest once in 40 million times."""


def row_digest(question: Question) -> int:
    """Of the images' sizes and RGB pixels and of the prompt, not of the answer: a number of BYTES bytes, signed.

    A picture that was compressed anew with losses has other pixels, and is another one.
    """
    digest = hashlib.blake2b(digest_size=BYTES)
    _add_images(digest, question.images)
    digest.update(question.prompt.encode("utf-8", "surrogatepass"))
    return _number(digest)


def images_digest(images: Sequence[Image.Image]) -> int:
    """Of sizes and RGB pixels alone: equal for questions about the same pictures in the same order."""
    digest = hashlib.blake2b(digest_size=BYTES)
    _add_images(digest, images)
    return _number(digest)


def _add_images(digest: "hashlib.blake2b", images: Sequence[Image.Image]) -> None:
    for image in images:
        digest.update(f"{image.width}x{image.height}\n".encode())
        digest.update(image.convert("RGB").tobytes())


def _number(digest: "hashlib.blake2b") -> int:
    return int.from_bytes(digest.digest(), "little", signed=True)
