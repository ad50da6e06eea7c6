"""Which rows of a data set or of a stream each process reads at each step of a run."""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from kvcapsule.data.question_stream import QuestionStream
from kvcapsule.errors import ConfigError, DataError

SEEDS = 1_000_003
"""Between the random numbers of two seeds."""


def require_even(batch: int, world: int) -> None:
    """Raises ConfigError if so many rows cannot be shared out among so many processes."""
    if batch % world:
        raise ConfigError(
            f"--batch {batch} cannot be shared out among {world} processes: choose a multiple of {world}."
        )


class Steps(Sampler[list[Any]]):
    """One rank's rows of every step: of one epoch, or of a run."""

    epoch_steps: int
    """Steps of an epoch, at most."""

    @abstractmethod
    def run(self, first: int, steps: int) -> None:
        """Give the steps of a run from here on, epoch after epoch, and not those of one epoch.

        Args:
            first: number of the next step.
            steps: of the whole run, those that are done included.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Steps of the epoch, or of the whole run: Lightning counts those that are done itself."""


class Shares(Steps):
    """One rank's rows of every step: of each `batch` rows in order, every world-th; those of one epoch, or of a run.

    Whole steps only where the order is shuffled, so that all ranks take as many steps; the last step of a fixed order
    may be short. What a step's rows are depends on its number alone, so that a resumed run goes on with the rows that
    an uninterrupted one would have had.
    """

    def __init__(
        self, length: int, batch: int, seed: int | None, rank: int = 0, world: int = 1, fixed: bool = False
    ) -> None:
        """seed: of the shuffle; None keeps the order. fixed: later epochs have the first one's steps, in another
        order."""
        require_even(batch, world)
        self.length, self.batch, self.seed, self.rank, self.world, self.fixed = length, batch, seed, rank, world, fixed
        steps = length // batch if seed is not None else -(-length // batch)
        self.epoch_steps = max(1, steps)
        self.first, self.steps = 0, self.epoch_steps

    def run(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        known = -1
        for number in range(self.first, self.steps):
            epoch, index = divmod(number, self.epoch_steps)
            if epoch != known:
                order, steps = self._order(epoch)
                known = epoch
            step = steps[index]
            share = order[step * self.batch : (step + 1) * self.batch][self.rank :: self.world]
            # A rank that the last rows do not reach measures one of them again, so that no rank waits for another.
            yield share or [order[-1]]

    def _order(self, epoch: int) -> tuple[list[int], list[int]]:
        """Of the rows, and of the steps that they are cut into."""
        order, steps = torch.arange(self.length), torch.arange(self.epoch_steps)
        if self.seed is not None:
            order = self._shuffled(self.length, 0 if self.fixed else epoch)
            steps = self._shuffled(self.epoch_steps, epoch) if self.fixed and epoch else steps
        return order.tolist(), steps.tolist()

    def _shuffled(self, count: int, epoch: int) -> torch.Tensor:
        assert self.seed is not None
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed * SEEDS + epoch))


class StreamShares(Steps):
    """One rank's rows of every step of a stream: of each `batch` rows in order, every world-th; those of the first
    epoch, or of a run.

    All ranks read the same stream, and whole steps of it only. A step's rows depend on its number alone, as the rows
    before it are read again, though not their images.
    """

    def __init__(self, stream: QuestionStream, batch: int, rank: int, world: int, fixed: bool = False) -> None:
        """fixed: later epochs have the first one's steps, in the same order."""
        require_even(batch, world)
        self.stream, self.batch, self.rank, self.world, self.fixed = stream, batch, rank, world, fixed
        self.epoch_steps = self.steps = max(1, len(stream) // batch)
        self.first, self.epochs = 0, range(1)

    def run(self, first: int, steps: int) -> None:
        self.first, self.steps, self.epochs = first, steps, range(steps)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for rows in islice(self._steps(), self.first, self.steps):
            yield rows[self.rank :: self.world]

    def _steps(self) -> Iterator[list[dict[str, Any]]]:
        """All ranks' rows of every step.

        Raises:
            DataError: if the stream ends before a step is whole.
        """
        for epoch in self.epochs:
            rows, steps = self.stream.epoch(0 if self.fixed else epoch), 0
            while len(step := list(islice(rows, self.batch))) == self.batch:
                yield step
                steps += 1
            if not steps:
                raise DataError(
                    f"the stream ends {len(step)} rows behind the {len(self.stream.first)} held out, and a step"
                    f" takes {self.batch}: lower --batch or --held_out, or give more data."
                )
