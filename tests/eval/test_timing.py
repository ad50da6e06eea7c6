"""Times of an evaluation: relative to the full cache, prefill and decode apart."""

from time import perf_counter
from typing import ClassVar

import datasets
import pytest
import torch
from rich.progress import Progress

from kvcapsule.eval import timing
from kvcapsule.eval.entries import FULL, Entry, full_entry
from kvcapsule.eval.quality import Answering
from kvcapsule.eval.timing import time_entries
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.policy import Full
from kvcapsule.segments.segment import Segment
from kvcapsule.testbeds import pages


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return pages.pages("test", 4)


def test_timing_is_relative_to_the_full_cache(model, processor, rows) -> None:
    compared = [full_entry(), Entry("segments", Full(), FULL)]
    timed = time_entries(model, processor, rows, compared, Answering(2, 4), Progress(disable=True), rounds=1, steps=2)
    assert timed[FULL] == (1.0, 1.0)
    assert all(0 < ratio < 100 for ratio in timed["segments"])


class Late:
    """A clock that can be put forward, in place of time that passes."""

    def __init__(self) -> None:
        self.by = 0.0

    def __call__(self) -> float:
        return perf_counter() + self.by


class SlowPrefill(Full):
    def __init__(self, clock: Late) -> None:
        self.clock = clock

    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.clock.by += 10.0
        return super().compress(prefill)


class SlowSegment(Segment):
    clock: ClassVar[Late]

    def for_query(self, q_BHGQD: torch.Tensor, scale: float) -> Segment:
        self.clock.by += 10.0
        return self


class SlowDecode(Full):
    def __init__(self, clock: Late) -> None:
        SlowSegment.clock = clock

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        (segment,), text = super().compress_visual(prefill, text)
        return Compressed([SlowSegment(segment.keys, segment.values, segment.owner)], text)


@pytest.mark.parametrize("slow", [SlowPrefill, SlowDecode])
def test_prefill_and_decode_are_timed_apart(model, processor, rows, monkeypatch, slow) -> None:
    clock = Late()
    monkeypatch.setattr(timing, "perf_counter", clock)
    compared = [full_entry(), Entry("slow", slow(clock), FULL)]
    timed = time_entries(model, processor, rows, compared, Answering(2, 4), Progress(disable=True), rounds=1, steps=2)[
        "slow"
    ]
    assert (timed.prefill_ratio > 10) == (slow is SlowPrefill)
    assert (timed.tokens_per_s_ratio < 0.1) == (slow is SlowDecode)
