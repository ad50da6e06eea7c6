"""The timing run: prefill and decoding of every method on the same batches, round-robin.

The full cache is timed as a user of transformers has it: DynamicCache, the model's attention, `generate`. Every method
is timed through `generate` too, so all times have its fixed costs, which on small models hide part of a difference. A
batch has one prompt with different images: prompts of different lengths would need padding, and a padding mask slows
only the full cache's attention.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, cast

import datasets
import torch
from rich.progress import Progress
from transformers import BatchFeature, LogitsProcessor, LogitsProcessorList, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache

from kvcapsule.data.batches import read_question
from kvcapsule.inference.attach import attach
from kvcapsule.inference.transformers_api import cache_argument

from .block import Block
from .entries import FULL, Entry
from .protocols import PROTOCOLS
from .quality import Answering
from .watched_generate import GREEDY, new_cache

BATCHES = 2
"""Number of timed batches."""
ROUNDS = 5
"""Timed runs of every method on each batch, after one run to warm up."""
STEPS = 24
"""Decode steps of a run."""


class Seconds(NamedTuple):
    """One run of one method on one batch."""

    prefill: float
    """Seconds until the first logits, compression included."""
    step: float
    """Mean seconds of the decode steps."""


class Timing(NamedTuple):
    """Medians, over batches and rounds, of times relative to the full cache in the same round."""

    prefill_ratio: float
    """Time of the method / time of the full cache: below 1 is faster."""
    tokens_per_s_ratio: float
    """Tokens a second of the method / those of the full cache: above 1 is faster."""


def time_entries(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    entries: Sequence[Entry],
    answering: Answering,
    progress: Progress,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, Timing]:
    """Time every entry; the arguments are those of `quality.evaluate`.

    Returns:
        By name of the entry. The full cache's ratios are 1 by definition.
    """
    timed = [block.timed_run(model) for block in _one_prompt_blocks(rows, model, processor, answering)]
    task = progress.add_task("timing", total=len(timed) * (rounds + 1) * len(entries))
    ratios: dict[str, list[Timing]] = defaultdict(list)
    for inputs, begin in timed:
        for turn in range(rounds + 1):
            # The order rotates, so that no method always follows the same other one.
            order = [*entries[turn % len(entries) :], *entries[: turn % len(entries)]]
            seconds_of = {}
            for entry in order:
                with nullcontext() if entry.method is None else attach(model, entry.method):
                    cache = new_cache(model, entry.method)
                    seconds_of[entry.name] = run_timed(model, inputs, cache, steps, begin)
                progress.advance(task)
            if turn == 0:
                continue
            full = seconds_of[FULL]
            for name, seconds in seconds_of.items():
                ratios[name].append(Timing(seconds.prefill / full.prefill, full.step / seconds.step))
    return {name: Timing(*(median(column) for column in zip(*values, strict=True))) for name, values in ratios.items()}


def _one_prompt_blocks(
    rows: datasets.Dataset, model: PreTrainedModel, processor: ProcessorMixin, answering: Answering
) -> list[Block]:
    result: list[Block] = []
    size = answering.batch
    for start in range(0, min(len(rows), BATCHES * size), size):
        questions = [read_question(rows[i], i) for i in range(start, min(start + size, len(rows)))]
        first = questions[0]
        # Images of as many as the prompt has places for, in turn.
        images = [question.images for question in questions if len(question.images) == len(first.images)]
        prompts = [first._replace(images=images[i % len(images)]) for i in range(len(questions))]
        result.append(PROTOCOLS[answering.protocol].of(prompts, model, processor))
    return result


def run_timed(
    model: PreTrainedModel,
    inputs: BatchFeature,
    cache: Cache,
    steps: int,
    begin: Callable[[Cache], None] | None = None,
    **options: Any,
) -> Seconds:
    """Write `steps` tokens after the first one with `generate`, through an empty cache.

    A CapsuleCache needs `with attach(model):` around it. `begin`: fills the cache first, within the prefill's time.
    `options`: further options of generate.
    """
    clock = _Clock(model.device, steps)
    started = clock.now()
    if begin is not None:
        begin(cache)
    cast("Any", model).generate(
        **inputs,
        **cache_argument(cache),
        # A fixed length: a method whose answers end early would otherwise be timed on other steps.
        min_new_tokens=steps + 1,
        max_new_tokens=steps + 1,
        logits_processor=LogitsProcessorList([clock]),
        **GREEDY,
        **options,
    )
    return Seconds(clock.first - started, (clock.last - clock.first) / steps)


class _Clock(LogitsProcessor):
    """Reads the time when the first and the last logits arrive."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps = device, steps
        self.calls = 0
        self.first = self.last = 0.0

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.calls == 0:
            self.first = self.now()
        elif self.calls == self.steps:
            self.last = self.now()
        self.calls += 1
        return scores
