"""Copies of what several segments share, made once."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """Memo of copies already made, so that tensors that several segments share stay shared."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[object, Any]] = {}

    def get_or_make(self, original: object, make: Callable[[], T]) -> T:
        """The copy of `original`: `make()` at the first call, the same object at later ones."""
        if id(original) not in self.copies:
            # The original is held too: its id is unique only while it lives.
            self.copies[id(original)] = (original, make())
        copy: T = self.copies[id(original)][1]
        return copy
