"""The capsule pool holds what the capsule made, slot by slot, in the order in which it is asked for."""

from collections.abc import Callable

import pytest
import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.kernels import attend
from kvcapsule.segments.pooled_segment import PooledSegment
from kvcapsule.serving.pool import CapsulePool, Rotation, compress_tiles, one_tile, slot_bytes

TILE, IMAGES, SLOTS = 8, 3, 11
LAYERS = range(4)


@pytest.fixture(params=["identity", "kvcapsule", "transform", "cross-layer"])
def capsule(
    request: pytest.FixtureRequest,
    identity: Callable[..., Capsule],
    random_capsule: Callable[..., Capsule],
    random_transform: Callable[..., Capsule],
    random_cross_layer: Callable[..., Capsule],
) -> Capsule:
    builders = {
        "identity": lambda: identity(TILE),
        "kvcapsule": lambda: random_capsule(tile=TILE),
        "transform": lambda: random_transform(TILE, (8, 6), (8, 5)),
        "cross-layer": lambda: random_cross_layer(tile=TILE, rows=8, channels=20),
    }
    return builders[request.param]()


def rotation(batch: int, count: int, first: int = 0) -> Rotation:
    angles = torch.arange(first, first + count)[:, None] / 100.0 ** torch.linspace(0, 1, 16).repeat(2)
    return angles.cos().expand(batch, -1, -1), angles.sin().expand(batch, -1, -1)


def tiles(batch: int, count: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(batch, 2, count, 32, generator=generator)  # noqa: E731
    return {layer: (draw(), draw()) for layer in LAYERS}


def test_what_is_put_into_slots_is_read_from_them(capsule: Capsule) -> None:
    count = 2 * TILE
    made = compress_tiles(capsule, LAYERS, tiles(IMAGES, count).__getitem__, rotation(IMAGES, count, 5))
    pool = CapsulePool(one_tile(capsule, LAYERS, torch.float32, rotation(1, TILE)), SLOTS)
    slots = [7, 2, 10, 0, 3, 5]
    pool.put(slots, made)
    query = torch.randn(IMAGES, 4, 1, 32, generator=torch.Generator().manual_seed(1))
    for layer in LAYERS:
        owner = made[layer].owner
        assert owner.tolist() == [0, 0, 1, 1, 2, 2]
        expected = attend(query, [made[layer]], 0.2)
        read = PooledSegment.of(pool.layers[layer], owner, torch.tensor(slots))
        torch.testing.assert_close(attend(query, [read], 0.2), expected, atol=1e-5, rtol=1e-4)
        # One image alone, its tiles in the other order.
        read = PooledSegment.of(pool.layers[layer], torch.zeros(2, dtype=torch.int64), torch.tensor([0, 10]))
        torch.testing.assert_close(attend(query[1:2], [read], 0.2), expected[1:2], atol=1e-5, rtol=1e-4)


def test_other_slots_stay_as_they_were(capsule: Capsule) -> None:
    made = compress_tiles(capsule, LAYERS, tiles(1, TILE).__getitem__, rotation(1, TILE))
    pool = CapsulePool(one_tile(capsule, LAYERS, torch.float32, rotation(1, TILE)), SLOTS)
    pool.put([4], made)
    before = [t.clone() for layer in LAYERS for t in pool.layers[layer].entry_tensors()]
    pool.put([5], compress_tiles(capsule, LAYERS, tiles(1, TILE).__getitem__, rotation(1, TILE, 3)))
    after = [t for layer in LAYERS for t in pool.layers[layer].entry_tensors()]
    changed = 0
    for old, new in zip(before, after, strict=True):
        rest = [slot for slot in range(SLOTS) if slot != 5]
        assert torch.equal(old[rest], new[rest])
        changed += not torch.equal(old, new)
    assert changed > 0


def test_its_bytes_are_those_of_its_slots(capsule: Capsule) -> None:
    form = one_tile(capsule, LAYERS, torch.float32, rotation(1, TILE))
    assert CapsulePool(form, SLOTS).bytes == SLOTS * slot_bytes(form)


def test_layers_are_asked_for_one_at_a_time(capsule: Capsule) -> None:
    asked: list[int] = []
    known = tiles(1, TILE)

    def read(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(layer)
        return known[layer]

    assert asked == []
    compress_tiles(capsule, LAYERS, read, rotation(1, TILE))
    assert asked == list(LAYERS)
