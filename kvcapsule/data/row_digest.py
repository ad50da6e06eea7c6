"""The digest of a question: equal for the same pictures and text, whatever file, format or split they come from."""

import hashlib

from .batches import Question

BYTES = 8
"""Two of a million different questions have the same digest once in 40 million times."""


def row_digest(question: Question) -> int:
    """Of the images' sizes and RGB pixels and of the prompt, not of the answer: a number of BYTES bytes, signed.

    A picture that was compressed anew with losses has other pixels, and is another one.
    """
    digest = hashlib.blake2b(digest_size=BYTES)
    for image in question.images:
        digest.update(f"{image.width}x{image.height}\n".encode())
        digest.update(image.convert("RGB").tobytes())
    digest.update(question.prompt.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little", signed=True)
