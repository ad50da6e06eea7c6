"""The keys of images: all that the capsule of an image depends on.

Keys form a chain. That of a prompt's n-th image has the tokens of the prompt up to the image's end, their positions,
and the images before it; so an entry is found behind the exact prefix alone that it was made behind.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..vlm.weights import tensor_digest
from .entry import StoreKey

KEY_FORMAT = 1
"""Raised whenever equal keys would no longer mean equal capsules."""


def image_keys(
    facts: Mapping[str, Any],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    images: Sequence[tuple[int, Mapping[str, torch.Tensor]]],
) -> list[StoreKey]:
    """The keys of a prompt's images, in their order.

    Args:
        facts: what identifies model, capsule and adapter, and whatever else all images have in common, in JSON's types.
        input_ids: [1, N].
        position_ids: [..., N], the positions of the tokens; None: they follow from the tokens.
        images: of each image the position behind its last token, and its tensors as the vision tower gets them: pixels,
            grid, size.
    """
    contents = [
        (end, "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items())).encode())
        for end, tensors in images
    ]
    return chained_keys(facts, input_ids, position_ids, contents)


def chained_keys(
    facts: Mapping[str, Any],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    images: Sequence[tuple[int, bytes]],
) -> list[StoreKey]:
    """`image_keys` of images of which each is given by bytes that tell its contents from all others."""
    keys, chain = [], hashlib.sha256()
    for end, content in images:
        chain.update(content)
        # The image behind this one does not have to hash the pixels again.
        chain.update(f"end {end}\n".encode())
        parts = {
            **facts,
            "format": KEY_FORMAT,
            "tokens": tensor_digest(input_ids[:, :end].to(torch.int64)),
            "positions": None if position_ids is None else tensor_digest(position_ids[..., :end].to(torch.int64)),
            "images": chain.hexdigest(),
            "end": end,
        }
        keys.append(StoreKey.of(parts))
    return keys
