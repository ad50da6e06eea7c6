"""Round-robin timing of contenders, so that other work of the machine slows all of them alike.

A contender is a list of calls that do the same on different copies of its data, one after the other. The data of a call
have then left the processor's caches, as in a decode step, which returns to a layer after all the others.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch

COLD = 2
"""The copies of a contender's data are at least this many times as large as the last-level cache."""
LEAST = 3
"""Rounds of every contender, however slow it is."""
BURST = 2e-3
"""Least seconds of one reading of the clock."""
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 64 * 2**20
"""Bytes of the last-level cache where the system does not say."""


class Contender(NamedTuple):
    """Calls that are timed under one name."""

    name: str
    calls: Sequence[Callable[[], Any]]
    """The same work on copies of the data."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of the calls; entering it is not timed."""
    graph: bool = True
    """Whether the calls can be captured as a CUDA graph."""


class Times(NamedTuple):
    """Seconds of one call, round by round; slow contenders have fewer rounds."""

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
        """How many times as long `other` takes: the median over the rounds of both."""
        return median(theirs / ours for ours, theirs in zip(self.rounds, other.rounds, strict=False))


def interleave(
    contenders: Sequence[Contender], device: torch.device, rounds: int, seconds: float, burst: float = BURST
) -> dict[str, Times]:
    """Time all contenders round-robin.

    Args:
        contenders: at least one.
        device: where they run.
        rounds: readings of each.
        seconds: a contender that took so many stops, after at least LEAST rounds.
        burst: least seconds of one reading of the clock, which covers as many calls as that takes; 0: one call.
    """
    timers = [_Burst(contender, device, burst) for contender in contenders]
    readings: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        # The order rotates, so that no contender always follows the same other one.
        start = turn % len(timers)
        for timer in [*timers[start:], *timers[:start]]:
            times = readings[timer.name]
            if len(times) == turn and (turn < LEAST or timer.spent < seconds):
                times.append(timer.time())
    return {name: Times(times) for name, times in readings.items()}


class _Burst:
    """One reading's calls of a contender; the next reading continues with the next copy of the data.

    On CUDA one pass through the copies is captured as a graph, so that the host's work between launches is not timed.
    """

    def __init__(self, contender: Contender, device: torch.device, burst: float) -> None:
        self.name, self.device, self.around = contender.name, device, contender.around
        self.next, self.spent, self.length = 0, 0.0, 1
        with self.around():
            for call in contender.calls:
                call()
            self.calls, self.calls_per_pass = contender.calls, 1
            if device.type == "cuda" and contender.graph:
                self.calls, self.calls_per_pass = [_captured(contender.calls)], len(contender.calls)
        while (took := self.time() * self.length * self.calls_per_pass) < burst:
            self.length *= max(2, min(64, int(burst / max(took, 1e-9))))
        self.spent = 0.0

    def time(self) -> float:
        """Seconds of one call."""
        order = [(self.next + i) % len(self.calls) for i in range(self.length)]
        self.next = (self.next + self.length) % len(self.calls)
        with self.around():
            started = now(self.device)
            for index in order:
                self.calls[index]()
            took = now(self.device) - started
        self.spent += took
        return took / self.length / self.calls_per_pass


def _captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replay: Callable[[], None] = graph.replay
    return replay


def now(device: torch.device) -> float:
    """The clock in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last-level cache of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_size(file.read_text()) for file in _CACHES.glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE)


def _size(text: str) -> int:
    """Bytes of "32768K"."""
    text = text.strip()
    return int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)


def copies(bytes_: int, device: torch.device) -> int:
    """Number of copies of data of so many bytes, so that no copy is still in a cache when it is read again."""
    return 1 + COLD * last_level_cache(device) // max(1, bytes_)
