"""Context managers that several `with` blocks share: entered by the first, left by the last."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock
from typing import Any


class SharedContexts:
    """Open contexts by key, for blocks in any thread."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._open: dict[Hashable, tuple[int, ExitStack]] = {}
        """Blocks inside, and what is left by the last."""

    @contextmanager
    def enter(self, key: Hashable, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Be inside the context of `key`; `make` makes it where no block is inside."""
        with self._lock:
            if key not in self._open:
                stack = ExitStack()
                stack.enter_context(make())
                self._open[key] = (0, stack)
            count, stack = self._open[key]
            self._open[key] = (count + 1, stack)
        try:
            yield
        finally:
            with self._lock:
                count, stack = self._open.pop(key)
                if count > 1:
                    self._open[key] = (count - 1, stack)
                else:
                    stack.close()
