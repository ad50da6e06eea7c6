"""End-to-end level: `generate` with the same prompts and numbers of tokens for every contender: time to the first
token, time of the others, memory."""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from transformers import BatchFeature

from ..timing import Seconds, run_timed
from . import contenders
from .contenders import BASELINES, DecodeSetup
from .interleaved_timing import LEAST, Times, now
from .models import Subject, weight_bytes
from .peak_memory import peak_bytes

LEVEL = "end-to-end"
_MEASURED = 2
"""Steps of the run that warms up and whose memory is measured; more of them do not raise its peak."""


@torch.no_grad()
def measure(
    subject: Subject, size: int, steps: int, rounds: int, seconds: float, compiled: bool
) -> contenders.Measured:
    """Rows of a subject, and what did not fit into the device's memory.

    Args:
        subject: what generates.
        size: sequences of the batch.
        steps: tokens written behind the first.
        rounds: runs of each contender, round-robin.
        seconds: a contender that took so many stops, after at least `interleaved_timing.LEAST` rounds.
        compiled: also time a compiled forward.
    """
    inputs = subject.batch(size)
    prompt = inputs["input_ids"].shape[1]
    times: dict[str, list[Seconds]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    stored, peaks, skipped = {}, {}, []
    fitting = []
    for setup in contenders.setups(subject, compiled):
        cache = setup.cache(prompt + steps + 1)
        try:
            with setup.on(subject.model):
                peaks[setup.name] = peak_bytes(
                    partial(run_timed, subject.model, inputs, cache, _MEASURED, **setup.options()), subject.model.device
                )
        except torch.OutOfMemoryError:
            skipped.append(contenders.out_of_memory(LEVEL, subject, size, setup))
            continue
        stored[setup.name] = contenders.cache_storage_bytes(cache)
        if setup.compiled:
            # Nothing is compiled while memory is counted.
            _once(subject, setup, inputs, prompt, _MEASURED)
        fitting.append(setup)
    for turn in range(rounds):
        start = turn % len(fitting)
        for setup in [*fitting[start:], *fitting[:start]]:
            if len(times[setup.name]) == turn and (turn < LEAST or spent[setup.name] < seconds):
                started = now(subject.model.device)
                times[setup.name].append(_once(subject, setup, inputs, prompt, steps))
                spent[setup.name] += now(subject.model.device) - started
    return rows(subject, size, steps, times, stored, peaks), skipped


def _once(subject: Subject, setup: DecodeSetup, inputs: BatchFeature, prompt: int, steps: int) -> Seconds:
    with setup.on(subject.model):
        return run_timed(subject.model, inputs, setup.cache(prompt + steps + 1), steps, **setup.options())


def rows(
    subject: Subject,
    size: int,
    steps: int,
    times: dict[str, list[Seconds]],
    stored: dict[str, int],
    peaks: dict[str, int],
) -> list[dict[str, Any]]:
    """JSON rows.

    Args:
        subject: what generates.
        size: sequences of the batch.
        steps: tokens written after the first.
        times: of every contender, run by run.
        stored: bytes of each cache a few tokens after its prompt.
        peaks: see peak_memory.peak_bytes.
    """
    prefill = {name: Times([run.prefill for run in runs]) for name, runs in times.items()}
    step = {name: Times([run.step for run in runs]) for name, runs in times.items()}
    total = {name: Times([run.prefill + steps * run.step for run in runs]) for name, runs in times.items()}
    full = [name for name in BASELINES if name in times]
    baseline, quickest, shortest = (
        min(full, key=lambda name: readings[name].median, default=None) for readings in (step, prefill, total)
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
            "whole_ratio": total[name].over(total[shortest]) if shortest else None,
            "bytes": stored[name],
            "bytes_ratio": stored[baseline] / stored[name] if baseline else None,
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
        for name, runs in times.items()
    ]
