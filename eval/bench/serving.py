"""Serving within a memory budget: the largest batch of image questions whose cache fits, and how many tokens a second
it writes.

What fits is found by bisection over storages that are really held: a cache of each size that is asked about is made,
takes a decode step, and is weighed. Two prompts with different images are prefilled; the sequences of a larger batch
are copies of these, in memory of their own. Weights are on neither side of the budget; a capsule's maps are on its
side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from . import contenders
from .contenders import BASELINES, Rung
from .decode_step import PROMPTS, filled, stepper, widened
from .interleaved_timing import Contender, interleave
from .models import Subject

LEVEL = "serving"
_MOST = 4096
"""Sequences past which nobody asks."""


@torch.no_grad()
def measure(subject: Subject, budget_mib: float, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a subject: the full caches and its methods, each at its own largest batch; and those of which not one
    sequence fits.

    Args:
        subject: what serves.
        budget_mib: what the cache may take.
        steps: tokens that are written at most; a StaticCache has room for so many.
    """
    budget, device = int(budget_mib * 2**20), subject.model.device
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for rung in contenders.rungs(subject, compiled=False):
        if rung.name == contenders.L0:
            continue
        room = subject.batch(1)["input_ids"].shape[1] + steps
        prompts = filled(subject, rung, subject.batch(PROMPTS), rung.cache(room))
        size, held = largest(partial(_held, subject, rung, prompts), budget)
        if size == 0:
            skipped.append(_skipped(subject, rung, budget_mib, held))
            continue
        cache = widened(prompts, size)
        # Two steps are taken before the first that is timed.
        contender = Contender(
            rung.name, [stepper(subject.model, rung, cache, size)], partial(rung.on, subject.model), graph=False
        )
        time = interleave([contender], device, steps - 2, float("inf"), burst=0)[rung.name]
        found.append(
            {
                "level": LEVEL,
                "geometry": subject.name,
                "shape": subject.shape,
                "batch": size,
                "visual_tokens": subject.visual,
                "method": rung.name,
                "budget_mib": budget_mib,
                "bytes": held,
                "seconds": time.median,
                "iqr_seconds": time.iqr,
                "rounds": len(time.rounds),
                "tokens_s": size / time.median,
                "failed": None,
            }
        )
    return _related(found), skipped


def largest(weigh: Callable[[int], int], budget: int) -> tuple[int, int]:
    """The largest count whose weight is within the budget, and that weight; 0 and the weight of one where not even one
    is.

    Doubles until it is past the budget, then bisects; a count's weight must not fall as counts rise.
    """
    low, held, high = 0, 0, 1
    while high <= _MOST and (weight := weigh(high)) <= budget:
        low, held, high = high, weight, 2 * high
    if low == 0:
        return 0, weight
    high = min(high, _MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        weight = weigh(middle)
        if weight <= budget:
            low, held = middle, weight
        else:
            high = middle
    return low, held


def _held(subject: Subject, rung: Rung, prompts: Cache, count: int) -> int:
    cache = widened(prompts, count)
    with rung.on(subject.model):
        stepper(subject.model, rung, cache, count)()
    return contenders.held(cache)


def _related(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the full cache that serves most tokens a second, and how many times as many others do."""
    full = max(
        (row for row in rows if row["method"] in BASELINES), key=lambda row: float(row["tokens_s"]), default=None
    )
    for row in rows:
        row["baseline"] = full and full["method"]
        row["ratio"] = full and row["tokens_s"] / full["tokens_s"]
        row["batch_ratio"] = full and row["batch"] / full["batch"]
    return rows


def _skipped(subject: Subject, rung: Rung, budget_mib: float, held: int) -> dict[str, Any]:
    return {
        "level": LEVEL,
        "geometry": subject.name,
        "batch": 1,
        "visual_tokens": subject.visual,
        "method": rung.name,
        "reason": f"one sequence takes {held / 2**20:.1f} MiB, and --memory-mib allows {budget_mib:g}",
    }
