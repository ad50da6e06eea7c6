"""Batches of questions with their answers, as a frozen VLM's inputs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import datasets
import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import BatchFeature, ProcessorMixin

from kvcapsule.data.batches import read_question
from kvcapsule.data.places import words_alone
from kvcapsule.data.prompts import encode
from kvcapsule.data.row_digest import row_digest
from kvcapsule.errors import ConfigError

from .answers import lengths_behind_prompts, marked_lengths, marks_answers, require_readable
from .harvest import AT_SPANS, Alignment
from .rows_read import RowsRead

_SEEDS = 1_000_003
"""Between the random numbers of two seeds."""


class Batch(NamedTuple):
    """Left-padded inputs over prompt and answer."""

    inputs: BatchFeature
    answers: torch.Tensor
    """[B]: how many tokens the answer has, at the end of each row, what closes the turn included."""
    alignment: Alignment = AT_SPANS
    """Where its tiles begin."""
    digests: tuple[int, ...] = ()
    """Of its rows (kvcapsule.data.row_digest)."""


class Questions(L.LightningDataModule):
    """Training and held-out rows of one source, each an image, a prompt and the right answer.

    A step of `batch` rows is shared out among the ranks, so that a run on several sees the rows that a run on one sees.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        held_out: datasets.Dataset,
        processor: ProcessorMixin,
        *,
        batch: int,
        workers: int = 0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        fixed: bool = False,
    ) -> None:
        """dtype: of the model, which not every vision tower casts its pixels to. fixed: see Shares."""
        super().__init__()
        self.fixed = fixed
        self.served()
        self.rows_read = RowsRead()
        self.rows, self.held_out, self.processor = rows, held_out, processor
        self.batch, self.workers, self.seed, self.dtype = batch, workers, seed, dtype

    def served(self, align: int = 1, words_before: int = 0, longest: int | None = None) -> Self:
        """From now on as an engine serves them: at any place of a sequence.

        Args:
            align: multiples at which tiles begin; they are cut as if a random number of tokens stood before each row.
            words_before: most words of training questions before each row's image; there may be any number, or none.
            longest: most tokens of a row; None sets no bound.
        """
        self.align, self.words_before, self.longest = align, words_before, longest
        return self

    def first_epoch(self) -> DataLoader[Any]:
        """This rank's share of every step of the first epoch, shuffled."""
        return self._loader(self.rows, self._shares())

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of every step that the trainer has left; without a trainer, the first epoch."""
        shares = self._shares()
        if self.trainer is not None and self.trainer.max_steps > 0:
            shares.run(self.trainer.global_step, self.trainer.max_steps)
        return self._loader(self.rows, shares)

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(self.held_out, Shares(len(self.held_out), self.batch, None, rank, world))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Called by Lightning before each step."""
        if self.trainer is not None and self.trainer.training:
            self.rows_read.add(batch.digests)
        return batch

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        numbers = [row["index"] for row in rows]
        questions = [read_question(row, row["index"]) for row in rows]
        before = [self._text_before(number) for number in numbers]
        pairs = list(zip(questions, before, strict=True))
        answered = [question.conversation(True, text) for question, text in pairs]
        marked = marks_answers(self.processor)
        inputs = encode(self.processor, answered, self.dtype, mark_answers=marked)
        if marked:
            answers = marked_lengths(inputs, numbers)
        else:
            prompts = encode(self.processor, [question.conversation(False, text) for question, text in pairs])
            answers = lengths_behind_prompts(inputs, prompts, numbers)
        require_readable(inputs, self.longest, numbers)
        return Batch(inputs, answers, self._alignment(numbers), tuple(map(row_digest, questions)))

    def _alignment(self, numbers: Sequence[int]) -> Alignment:
        """Of the rows with these numbers: the same in every epoch, pass and process."""
        if self.align == 1:
            return AT_SPANS
        return Alignment(self.align, tuple(_drawn(self.align, self._random(number)) for number in numbers))

    def _text_before(self, number: int) -> str:
        """Words of other questions, for the row with this number."""
        if not self.words_before:
            return ""
        random, words = self._random(number + 1), list[str]()
        count = _drawn(self.words_before + 1, random)
        while len(words) < count:
            words += words_alone(self.rows[_drawn(len(self.rows), random)]["prompt"]).split()
        return " ".join(words[:count])

    def _random(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * _SEEDS + number)

    def _shares(self) -> "Shares":
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Shares(len(self.rows), self.batch, self.seed, rank, world, self.fixed)

    def _loader(self, rows: datasets.Dataset, shares: "Shares") -> DataLoader[Any]:
        indexed = _Indexed(rows)
        return DataLoader(indexed, batch_sampler=shares, collate_fn=self.collate, num_workers=self.workers)  # type: ignore[arg-type]


def _drawn(below: int, random: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=random))


class Shares(Sampler[list[int]]):
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
        if batch % world:
            raise ConfigError(
                f"--batch {batch} cannot be shared out among {world} processes: choose a multiple of {world}."
            )
        self.length, self.batch, self.seed, self.rank, self.world, self.fixed = length, batch, seed, rank, world, fixed
        steps = length // batch if seed is not None else -(-length // batch)
        self.epoch_steps = max(1, steps)
        self.first, self.steps = 0, self.epoch_steps

    def run(self, first: int, steps: int) -> None:
        """Give the steps of a run from here on, epoch after epoch, and not those of one epoch.

        Args:
            first: number of the next step.
            steps: of the whole run, those that are done included.
        """
        self.first, self.steps = first, steps

    def __len__(self) -> int:
        """Steps of the epoch, or of the whole run: Lightning counts those that are done itself."""
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
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed * _SEEDS + epoch))


class _Indexed:
    """Rows that know their number, so that a bad one can be named."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.rows[i], "index": i}
