"""What is counted of capsules while an engine runs, in the scheduler and in the workers. Needs no vLLM."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COUNTS = {
    "images_compressed": "Images that were compressed; a preempted request's are compressed again.",
    "images_left_raw": "Images that stayed in their blocks because the capsule pool was full.",
    "compression_seconds": "Seconds of compressing images.",
    "reading_seconds": "Seconds of attention over capsules, and over the blocks of the same sequences.",
    "store_hits": "Images whose capsule came from the store.",
    "store_misses": "Images that the store did not know.",
    "store_skipped": "Requests with images that did not use the store: something about them was in doubt.",
    "store_read_bytes": "Bytes of capsules that came from the store.",
    "store_written_bytes": "Bytes of capsules that the store was given.",
    "store_seconds": "Seconds of making and taking such bytes in the workers.",
}
"""What only grows, and its description."""
LEVELS = {
    "pool_used_bytes": "Bytes of the capsule pool that hold images.",
    "pool_total_bytes": "Bytes of the capsule pool.",
}
"""What rises and falls."""


class Tally:
    """Counts since they were last taken, and the latest levels."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._levels: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Raises KeyError for a name that COUNTS does not have."""
        COUNTS[name]
        self._counts[name] = self._counts.get(name, 0) + amount

    def level(self, name: str, value: float) -> None:
        """Raises KeyError for a name that LEVELS does not have."""
        LEVELS[name]
        self._levels[name] = value

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def take(self) -> dict[str, dict[str, float]]:
        """{"counts", "levels"}: counts since the last call, and the levels that changed; {} if there is nothing."""
        counts, self._counts = self._counts, {}
        levels = {name: value for name, value in self._levels.items() if self._told.get(name) != value}
        self._told |= levels
        return {"counts": counts, "levels": levels} if counts or levels else {}


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two of what `take` gives: counts added, the later levels."""
    counts, more = first.get("counts", {}), second.get("counts", {})
    added = {name: counts.get(name, 0) + more.get(name, 0) for name in {**counts, **more}}
    return {"counts": added, "levels": {**first.get("levels", {}), **second.get("levels", {})}}
