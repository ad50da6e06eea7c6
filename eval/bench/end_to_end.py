"""End to end: `generate` on both sides, with the same prompts and as many tokens: time to the first token, time of the
others, memory."""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from transformers import BatchFeature

from ..timing import Seconds, run_timed
from . import contenders
from .contenders import BASELINES, Rung
from .interleaved_timing import LEAST, Times, now
from .models import Subject, weight_bytes
from .peak_memory import peak_bytes

LEVEL = "end-to-end"
_MEASURED = 2
"""Steps of the run that warms up and whose memory is measured: it ends with more of them as it was after the first."""


@torch.no_grad()
def measure(
    subject: Subject, size: int, steps: int, rounds: int, seconds: float, compiled: bool
) -> contenders.Measured:
    """Rows of a subject, and what did not fit into the device's memory.

    Args:
        subject: what generates.
        size: sequences of the batch.
        steps: tokens written behind the first.
        rounds: runs of each contender, which take turns.
        seconds: after so many a contender rests, if it had `clock.LEAST` rounds.
        compiled: whether a compiled forward is timed, too.
    """
    inputs = subject.batch(size)
    prompt = inputs["input_ids"].shape[1]
    found: dict[str, list[Seconds]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    held, peaks, skipped = {}, {}, []
    going = []
    for rung in contenders.rungs(subject, compiled):
        cache = rung.cache(prompt + steps + 1)
        try:
            with rung.on(subject.model):
                peaks[rung.name] = peak_bytes(
                    partial(run_timed, subject.model, inputs, cache, _MEASURED, **rung.options()), subject.model.device
                )
        except torch.OutOfMemoryError:
            skipped.append(contenders.no_room(LEVEL, subject, size, rung))
            continue
        held[rung.name] = contenders.held(cache)
        if rung.compiled:
            # What counts memory keeps the compiler from its work.
            _once(subject, rung, inputs, prompt, _MEASURED)
        going.append(rung)
    for turn in range(rounds):
        start = turn % len(going)
        for rung in [*going[start:], *going[:start]]:
            if len(found[rung.name]) == turn and (turn < LEAST or spent[rung.name] < seconds):
                started = now(subject.model.device)
                found[rung.name].append(_once(subject, rung, inputs, prompt, steps))
                spent[rung.name] += now(subject.model.device) - started
    return rows(subject, size, steps, found, held, peaks), skipped


def _once(subject: Subject, rung: Rung, inputs: BatchFeature, prompt: int, steps: int) -> Seconds:
    with rung.on(subject.model):
        return run_timed(subject.model, inputs, rung.cache(prompt + steps + 1), steps, **rung.options())


def rows(
    subject: Subject,
    size: int,
    steps: int,
    found: dict[str, list[Seconds]],
    held: dict[str, int],
    peaks: dict[str, int],
) -> list[dict[str, Any]]:
    """JSON rows. `held`: bytes of each cache a few tokens behind its prompt; `peaks`: see peak.peak_bytes."""
    prefill = {name: Times([run.prefill for run in runs]) for name, runs in found.items()}
    step = {name: Times([run.step for run in runs]) for name, runs in found.items()}
    whole = {name: Times([run.prefill + steps * run.step for run in runs]) for name, runs in found.items()}
    full = [name for name in BASELINES if name in found]
    baseline, quickest, shortest = (
        min(full, key=lambda name: times[name].median, default=None) for times in (step, prefill, whole)
    )
    return [
        {
            "level": LEVEL,
            "geometry": subject.name,
            "shape": subject.shape,
            "batch": size,
            "visual_tokens": subject.visual,
            "new_tokens": steps + 1,
            "method": name,
            "baseline": baseline,
            "ratio": step[name].over(step[baseline]) if baseline else None,
            "whole_ratio": whole[name].over(whole[shortest]) if shortest else None,
            "bytes": held[name],
            "bytes_ratio": held[baseline] / held[name] if baseline else None,
            "weight_bytes": weight_bytes(subject.model),
            "peak_bytes": peaks[name],
            "seconds": step[name].median,
            "iqr_seconds": step[name].iqr,
            "rounds": len(runs),
            "ttft_seconds": prefill[name].median,
            "ttft_overhead": 1 / prefill[name].over(prefill[quickest]) - 1 if quickest else None,
            "tokens_s": size / step[name].median,
            "failed": None,
        }
        for name, runs in found.items()
    ]
