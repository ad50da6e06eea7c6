"""The rows that a run trains on, noted as batches are read."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from kvcapsule.capsule.training_rows import TrainingRows

from .processes import gathered


class Digested(Protocol):
    """A batch that knows the digests of its rows."""

    @property
    def digests(self) -> tuple[int, ...]: ...


B = TypeVar("B", bound=Digested)


class RowsRead:
    """Digests of the rows of all batches that this process read."""

    def __init__(self) -> None:
        self._digests: set[int] = set()

    def add(self, digests: Iterable[int]) -> None:
        self._digests.update(digests)

    def noted(self, batches: Iterable[B]) -> Iterator[B]:
        """The same batches, each noted as it is read."""
        for batch in batches:
            self.add(batch.digests)
            yield batch

    def gather(self) -> list[int]:
        """The digests of all processes of the run, ascending; every process must call it."""
        digests = torch.tensor(sorted(self._digests), dtype=torch.int64)
        self._digests = set(torch.cat(gathered(digests)).tolist())
        return sorted(self._digests)

    def training_rows(self) -> TrainingRows:
        """As a capsule records them, once they are gathered."""
        return TrainingRows.of(self._digests)
