"""Step level: decode steps of a model after a cached prompt, without the loop of generate."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel
from transformers.cache_utils import Cache

from kvcapsule.inference.transformers_api import cache_argument

from . import contenders
from .contenders import BASELINES, DecodeSetup
from .interleaved_timing import Contender, Times, interleave
from .models import Subject, weight_bytes

LEVEL = "step"
PROMPTS = 2
"""Prompts that are prefilled where decoding alone is measured."""
_WARM_UP = 4
"""Capacity for the steps before the first that is timed: one to warm up, one to see how long it takes, two spare."""
_TOKEN = 7
"""The token that every step reads; it is no image token."""


@torch.no_grad()
def measure(subject: Subject, size: int, steps: int, compiled: bool, read_gb_s: float) -> contenders.Measured:
    """Rows of a subject, the full caches, then its methods; and what did not fit into the device's memory.

    Two prompts with different images are prefilled; the sequences of a larger batch are copies of these in separate
    memory.

    Args:
        subject: what decodes.
        size: sequences of the batch.
        steps: readings; the order of the contenders turns from step to step.
        compiled: whether a compiled forward is timed, too.
        read_gb_s: read bandwidth of the machine, which `bandwidth_fraction` is a fraction of.
    """
    prompts = subject.batch(min(size, PROMPTS))
    tokens = prompts["input_ids"].shape[1] + steps + _WARM_UP
    caches: dict[str, Cache] = {}
    timed: dict[str, Contender] = {}
    skipped = []
    setups = contenders.setups(subject, compiled)
    # Where memory is short, the methods come first, then the baselines, and eager attention last.
    for setup in reversed(setups):
        try:
            cache = widened(filled(subject, setup, prompts, setup.cache(tokens)), size)
        except torch.OutOfMemoryError:
            skipped.append(contenders.out_of_memory(LEVEL, subject, size, setup))
            continue
        caches[setup.name] = cache
        step = stepper(subject.model, setup, cache, size)
        timed[setup.name] = Contender(setup.name, [step], partial(setup.on, subject.model), graph=False)
    fitting = [timed[setup.name] for setup in setups if setup.name in timed]
    times = interleave(fitting, subject.model.device, steps, float("inf"), burst=0)
    return rows(
        subject, size, times, {name: contenders.cache_storage_bytes(cache) for name, cache in caches.items()}, read_gb_s
    ), skipped


def filled(subject: Subject, setup: DecodeSetup, inputs: BatchFeature, cache: Cache) -> Cache:
    """A cache that holds the prompts of a batch. Prefill is the model's own in any case, so it need not be eager."""
    model: Any = subject.model
    with setup._replace(attention="sdpa").on(subject.model), torch.no_grad():
        model(**inputs, **cache_argument(cache), logits_to_keep=1)
    return cache


def widened(prompts: Cache, size: int) -> Cache:
    """A cache of `size` sequences in separate memory, with the prompts of `prompts` again and again."""
    cache: Any = copy.deepcopy(prompts)
    cache.reorder_cache(torch.arange(size) % PROMPTS)
    return cache  # type: ignore[no-any-return]


def stepper(model: PreTrainedModel, setup: DecodeSetup, cache: Cache, size: int) -> Callable[[], Any]:
    """A decode step of the whole batch; the cache grows by a token each time."""
    token, call = torch.full((size, 1), _TOKEN, device=model.device), setup.call(model)

    @torch.no_grad()
    def step() -> Any:
        return call(input_ids=token, **cache_argument(cache)).logits

    return step


def rows(
    subject: Subject, size: int, times: dict[str, Times], held: dict[str, int], read_gb_s: float
) -> list[dict[str, Any]]:
    """JSON rows. `held`: bytes of each cache after its steps. Ratios are null where no full cache fitted."""
    full = [name for name in BASELINES if name in times]
    baseline = min(full, key=lambda name: times[name].median, default=None)
    weights = weight_bytes(subject.model)
    return [
        {
            "level": LEVEL,
            "geometry": subject.name,
            "shape": subject.shape,
            "batch": size,
            "visual_tokens": subject.visual,
            "method": name,
            "baseline": baseline,
            "ratio": time.over(times[baseline]) if baseline else None,
            "bound": (weights + held[baseline]) / (weights + held[name]) if baseline else None,
            "bytes": held[name],
            "bytes_ratio": held[baseline] / held[name] if baseline else None,
            "weight_bytes": weights,
            "seconds": time.median,
            "iqr_seconds": time.iqr,
            "rounds": len(time.rounds),
            "tokens_s": size / time.median,
            "bandwidth_fraction": (weights + held[name]) / time.median / 1e9 / read_gb_s,
            "failed": None,
        }
        for name, time in times.items()
    ]
