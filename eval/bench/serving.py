"""Serving level: the largest batch of image questions whose cache fits into a memory limit, and how many tokens a
second it writes.

The batch is found by bisection over real storages: a cache of each tried size is built, takes a decode step, and is
measured. Two prompts with different images are prefilled; the sequences of a larger batch are copies of these in
separate memory. The limit counts a capsule's maps, and no weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from . import contenders
from .contenders import BASELINES, DecodeSetup
from .decode_step import PROMPTS, filled, stepper, widened
from .interleaved_timing import Contender, interleave
from .models import Subject

LEVEL = "serving"
_MOST = 4096
"""Largest batch that is tried."""


@torch.no_grad()
def measure(subject: Subject, budget_mib: float, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a subject: the full caches and its methods at their largest batches; and those of which not one sequence
    fits.

    Args:
        subject: what serves.
        budget_mib: memory for the cache, in MiB.
        steps: most tokens to write, which a StaticCache allocates in advance.
    """
    budget, device = int(budget_mib * 2**20), subject.model.device
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for setup in contenders.setups(subject, compiled=False):
        if setup.name == contenders.L0:
            continue
        tokens = subject.batch(1)["input_ids"].shape[1] + steps
        prompts = filled(subject, setup, subject.batch(PROMPTS), setup.cache(tokens))
        size, stored = largest(partial(_bytes_of, subject, setup, prompts), budget)
        if size == 0:
            skipped.append(_skipped(subject, setup, budget_mib, stored))
            continue
        cache = widened(prompts, size)
        # Two steps are taken before the first that is timed.
        contender = Contender(
            setup.name, [stepper(subject.model, setup, cache, size)], partial(setup.on, subject.model), graph=False
        )
        time = interleave([contender], device, steps - 2, float("inf"), burst=0)[setup.name]
        rows.append(
            {
                "level": LEVEL,
                "geometry": subject.name,
                "shape": subject.shape,
                "batch": size,
                "visual_tokens": subject.visual,
                "method": setup.name,
                "budget_mib": budget_mib,
                "bytes": stored,
                "seconds": time.median,
                "iqr_seconds": time.iqr,
                "rounds": len(time.rounds),
                "tokens_s": size / time.median,
                "failed": None,
            }
        )
    return _related(rows), skipped


def largest(bytes_of: Callable[[int], int], limit: int) -> tuple[int, int]:
    """The largest count with a size within the limit, and that size; 0 and the size of one if that is too large.

    Doubles the count until the size is above the limit, then bisects.

    Args:
        bytes_of: bytes of a count, which must not fall as counts grow.
        limit: in bytes.
    """
    low, size_of_low, high = 0, 0, 1
    while high <= _MOST and (size := bytes_of(high)) <= limit:
        low, size_of_low, high = high, size, 2 * high
    if low == 0:
        return 0, size
    high = min(high, _MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        size = bytes_of(middle)
        if size <= limit:
            low, size_of_low = middle, size
        else:
            high = middle
    return low, size_of_low


def _bytes_of(subject: Subject, setup: DecodeSetup, prompts: Cache, count: int) -> int:
    cache = widened(prompts, count)
    with setup.on(subject.model):
        stepper(subject.model, setup, cache, count)()
    return contenders.cache_storage_bytes(cache)


def _related(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the full cache with the most tokens a second as baseline, and the ratios to it."""
    full = max(
        (row for row in rows if row["method"] in BASELINES), key=lambda row: float(row["tokens_s"]), default=None
    )
    for row in rows:
        row["baseline"] = full and full["method"]
        row["ratio"] = full and row["tokens_s"] / full["tokens_s"]
        row["batch_ratio"] = full and row["batch"] / full["batch"]
    return rows


def _skipped(subject: Subject, setup: DecodeSetup, budget_mib: float, stored: int) -> dict[str, Any]:
    return {
        "level": LEVEL,
        "geometry": subject.name,
        "batch": 1,
        "visual_tokens": subject.visual,
        "method": setup.name,
        "reason": f"one sequence takes {stored / 2**20:.1f} MiB, and --memory-mib allows {budget_mib:g}",
    }
