"""Harvests in memory: the same ones at every pass, as many as fit, and the VLM run for the others."""

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

    def run(batch: Any) -> list[LayerHarvest]:
        ran.append(batch.number)
        return [layer(batch.number)]

    keys = [
        [float(memory.harvest(batch, run)[0].keys.max()) for batch in memory.batches(loader, count)] for count in counts
    ]
    return keys, ran, loader.passes


def test_each_batch_is_run_once_where_all_fit() -> None:
    keys, ran, begun = passes(2**20, [3, 2, 5, 4])
    assert keys == [[0, 1, 2], [0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3]]
    assert ran == [0, 1, 2, 3, 4] and begun == 2


def test_what_does_not_fit_is_run_again_and_nothing_is_held_without_a_limit() -> None:
    one = sum(t.nbytes for t in (layer(0).keys,) * 4) + 4 + 16 + 8
    keys, ran, _ = passes(2 * one, [4, 4])
    assert keys == [[0, 1, 2, 3]] * 2 and ran == [0, 1, 2, 3, 2, 3]
    assert passes(0, [2, 2])[1] == [0, 1, 0, 1]


def test_a_closed_memory_holds_nothing() -> None:
    memory, ran = HarvestMemory(2**20), []
    batch: Any = SimpleNamespace(number=7)

    def run(of: Any) -> list[LayerHarvest]:
        ran.append(of.number)
        return [layer(of.number)]

    memory.harvest(batch, run)
    memory.harvest(batch, run)
    assert ran == [7]
    memory.close()
    memory.harvest(batch, run)
    memory.harvest(batch, run)
    assert ran == [7, 7, 7] and memory.used == 0
