"""What a fuzzer counts, and the JSON in which it says so."""

import resource
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvcapsule.environment import machine, versions


class HangError(BaseException):
    """What is tried took too long by the clock; raised past all that it catches."""


@dataclass
class FuzzReport:
    """What became of the inputs."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind of input: how many came to each end."""
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """Seconds of CPU that one took."""
    peak: int = 0
    """Bytes of memory at the peak, above those before the first."""

    @property
    def total(self) -> Counter[str]:
        return sum(self.outcomes.values(), Counter())

    def add(self, kind: str, outcome: str) -> None:
        """Count an input."""
        self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def result(self, script: str, count: int, seed: int, seconds_key: str) -> dict[str, Any]:
        """The JSON object of a run of `script`; seconds_key: the name that it gives to `slowest`."""
        return {
            "command": f"python {script} --count {count} --seed {seed}",
            "count": count,
            "seed": seed,
            "outcomes": {kind: dict(counts) for kind, counts in sorted(self.outcomes.items())},
            "total": dict(self.total),
            "failures": self.failures,
            seconds_key: round(self.slowest, 3),
            "peak_bytes_above_start": self.peak,
            "versions": versions(),
            "machine": machine(),
        }

    def line(self) -> str:
        return f"{dict(self.total)}, {len(self.failures)} failures, slowest {self.slowest:.2f} s, {self.peak:,} bytes"


def peak_bytes() -> int:
    """Memory of this process at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
