"""Slots of a capsule pool: which are free."""


class SlotAllocator:
    """Hands out numbers of slots, and takes them back."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` slots; None, and none taken, if there are not so many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, slots: list[int]) -> None:
        self._free += slots
