"""Harvests in memory: the same ones at every pass where all fit, and none where they do not."""

from types import SimpleNamespace
from typing import Any

import torch

from kvcapsule.segments.segment import Segment
from kvcapsule.training.harvest import LayerHarvest
from kvcapsule.training.harvest_memory import HarvestMemory


def layer(number: int) -> LayerHarvest:
    """Keys, values, query, and the rest of 4 x 8 numbers each, and three of one integer."""
    keys, values, query, rest = (torch.full((1, 1, 4, 8), float(number)) for _ in range(4))
    reads, visible = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    owner = torch.zeros(1, dtype=torch.long)
    return LayerHarvest(keys, values, owner, None, query, reads, Segment(rest, rest, owner), visible, 1.0)


class Loader:
    """Batches of one number each, which are other objects in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([SimpleNamespace(number=i) for i in range(5)])


def passes(limit: int, counts: list[int]) -> tuple[list[list[float]], list[int], int]:
    """The keys of every pass, the batches that the VLM ran for, and how often the loader was begun."""
    memory, loader, ran = HarvestMemory(limit), Loader(), []

    def harvest(batch: Any) -> list[LayerHarvest]:
        held = memory.held(batch)
        if held is not None:
            return held
        ran.append(batch.number)
        recording, layers = memory.recording(batch), [layer(batch.number)]
        recording.add(layers)
        recording.end()
        return layers

    keys = [[float(harvest(batch)[0].keys.max()) for batch in memory.batches(loader, count)] for count in counts]
    return keys, ran, loader.passes


def test_each_batch_is_run_once_where_all_fit() -> None:
    keys, ran, begun = passes(2**20, [3, 2, 5, 4])
    assert keys == [[0, 1, 2], [0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3]]
    assert ran == [0, 1, 2, 3, 4] and begun == 2


def test_nothing_is_held_where_not_all_fit() -> None:
    """The first batch tells."""
    one = sum(t.nbytes for t in (layer(0).keys,) * 4) + 4 + 16 + 8
    for limit in (0, 4 * one - 1):
        keys, ran, begun = passes(limit, [4, 4])
        assert keys == [[0, 1, 2, 3]] * 2 and ran == [0, 1, 2, 3] * 2 and begun == 2
    assert passes(4 * one, [4, 4])[1] == [0, 1, 2, 3]


def test_a_batch_is_let_go_as_soon_as_its_first_layers_are_too_large() -> None:
    one = sum(t.nbytes for t in (layer(0).keys,) * 4) + 4 + 16 + 8
    memory = HarvestMemory(2 * one)
    recording = memory.recording(SimpleNamespace(number=0))
    recording.add([layer(0)])
    assert recording.layers is not None
    recording.add([layer(1), layer(2)])
    assert recording.layers is None and memory.limit == 0
    recording.end()
    assert memory.used == 0


def test_a_closed_memory_holds_nothing() -> None:
    memory, batch = HarvestMemory(2**20), SimpleNamespace(number=7)
    for held in (True, False):
        recording = memory.recording(batch)
        recording.add([layer(7)])
        recording.end()
        assert (memory.held(batch) is not None) == held == (memory.used > 0)
        memory.close()
