"""The keys of images in a store: a chain over all that an image's capsule depends on."""

from typing import Any

import torch

from kvcapsule.store.keys import image_keys


def keys(**changed: Any) -> list[str]:
    """Digests of the keys of two images, of 4 and 3 tokens, in a prompt of 10."""
    values: dict[str, Any] = {
        "facts": {"weights": "w", "capsule": "c"},
        "input_ids": torch.tensor([[1, 9, 9, 9, 9, 2, 9, 9, 9, 3]]),
        "position_ids": torch.arange(10)[None],
        "images": [(5, {"pixel_values": torch.ones(4, 3)}), (9, {"pixel_values": torch.zeros(3, 3)})],
    }
    return [key.digest for key in image_keys(**{**values, **changed})]


def test_keys_are_a_chain() -> None:
    first, second = keys()
    assert first != second and keys() == [first, second]
    ids = torch.tensor([[1, 9, 9, 9, 9, 2, 9, 9, 9, 4]])
    assert keys(input_ids=ids) == [first, second], "what follows the last image counts"
    ids = torch.tensor([[1, 9, 9, 9, 9, 5, 9, 9, 9, 3]])
    assert keys(input_ids=ids)[0] == first and keys(input_ids=ids)[1] != second
    other = [(5, {"pixel_values": torch.full((4, 3), 2.0)}), (9, {"pixel_values": torch.zeros(3, 3)})]
    assert not {*keys(images=other)} & {first, second}
    moved = torch.arange(10)[None] + (torch.arange(10) > 6)
    assert keys(position_ids=moved)[0] == first and keys(position_ids=moved)[1] != second
    assert not {*keys(facts={"weights": "v", "capsule": "c"})} & {first, second}
    grid = [(5, {"pixel_values": torch.ones(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])})]
    assert keys(images=grid) != [first]
