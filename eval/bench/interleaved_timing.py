"""Timing of contenders in turn, so that whatever else the machine does falls on all of them alike.

A contender is a list of calls that do the same on different copies of its data, one after the other: what a call reads
has then left the caches of the processor, as it has when a decode step comes back to a layer after all the others.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch

COLD = 2
"""Times the last-level cache that the copies of a contender's data fill at least."""
LEAST = 3
"""Rounds that every contender takes part in, however slow it is."""
BURST = 2e-3
"""Seconds that one reading of the clock covers at least."""
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 64 * 2**20
"""Taken for the last-level cache where the system does not tell."""


class Contender(NamedTuple):
    """What is timed."""

    name: str
    calls: Sequence[Callable[[], Any]]
    """The same work on copies of the data."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What must be entered for the calls; not timed."""
    graph: bool = True
    """Whether the calls can be captured as a CUDA graph."""


class Times(NamedTuple):
    """Seconds of one call, round by round; contenders that are too slow for the time that they are given have fewer
    rounds."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles, 0 of a single round."""
        if len(self.rounds) < 2:
            return 0.0
        low, _, high = quantiles(self.rounds, n=4, method="inclusive")
        return high - low

    def over(self, other: "Times") -> float:
        """How many times as long `other` takes: the median over the rounds that both took part in."""
        return median(theirs / ours for ours, theirs in zip(self.rounds, other.rounds, strict=False))


def interleave(
    contenders: Sequence[Contender], device: torch.device, rounds: int, seconds: float, burst: float = BURST
) -> dict[str, Times]:
    """Time all contenders, one after the other, again and again.

    Args:
        contenders: at least one.
        device: where they run.
        rounds: readings of each.
        seconds: after so many a contender rests, if it had LEAST rounds.
        burst: seconds that one reading of the clock covers at least, by as many calls as that takes; 0: a reading is
            one call.
    """
    timers = [_Burst(contender, device, burst) for contender in contenders]
    found: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        # The order turns, so that nobody always runs in the wake of the same other.
        start = turn % len(timers)
        for timer in [*timers[start:], *timers[:start]]:
            times = found[timer.name]
            if len(times) == turn and (turn < LEAST or timer.spent < seconds):
                times.append(timer.time())
    return {name: Times(times) for name, times in found.items()}


class _Burst:
    """As many calls of a contender as the clock needs, going on through its copies from reading to reading.

    On CUDA one pass through the copies is captured as a graph, so that what the host does between launches is not
    timed.
    """

    def __init__(self, contender: Contender, device: torch.device, burst: float) -> None:
        self.name, self.device, self.around = contender.name, device, contender.around
        self.next, self.spent, self.length = 0, 0.0, 1
        with self.around():
            for call in contender.calls:
                call()
            self.calls, self.each = contender.calls, 1
            if device.type == "cuda" and contender.graph:
                self.calls, self.each = [_captured(contender.calls)], len(contender.calls)
        while (took := self.time() * self.length * self.each) < burst:
            self.length *= max(2, min(64, int(burst / max(took, 1e-9))))
        self.spent = 0.0

    def time(self) -> float:
        """Seconds of one call."""
        order = [(self.next + i) % len(self.calls) for i in range(self.length)]
        self.next = (self.next + self.length) % len(self.calls)
        with self.around():
            started = now(self.device)
            for place in order:
                self.calls[place]()
            took = now(self.device) - started
        self.spent += took
        return took / self.length / self.each


def _captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replay: Callable[[], None] = graph.replay
    return replay


def now(device: torch.device) -> float:
    """Seconds of the clock once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache before the memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_size(place.read_text()) for place in _CACHES.glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE)


def _size(text: str) -> int:
    """Bytes of "32768K"."""
    text = text.strip()
    return int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)


def copies(bytes_: int, device: torch.device) -> int:
    """Copies of data of so many bytes that a contender goes through, so that none is still in a cache when its turn
    comes again."""
    return 1 + COLD * last_level_cache(device) // max(1, bytes_)
