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
        self.fixed, self.align, self.words_before = fixed, 1, 0
        self.rows_read = RowsRead()
        self.rows, self.held_out, self.processor = rows, held_out, processor
        self.batch, self.workers, self.seed, self.dtype = batch, workers, seed, dtype

    def served(self, align: int = 1, words_before: int = 0) -> Self:
        """From now on as an engine serves them: at any place of a sequence.

        Args:
            align: multiples at which tiles begin; they are cut as if a random number of tokens stood before each row.
            words_before: most words of training questions before each row's image; there may be any number, or none.
        """
        self.align, self.words_before = align, words_before
        return self

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of every step, shuffled anew in each epoch."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(self.rows, Shares(len(self.rows), self.batch, self.seed, rank, world, self.fixed))

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(self.held_out, Shares(len(self.held_out), self.batch, None, rank, world))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Called by Lightning before each step."""
        if self.trainer is not None and self.trainer.training:
            self.rows_read.add(batch.digests)
        return batch

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        questions = [read_question(row, row["index"]) for row in rows]
        before = [self._text_before(row["index"]) for row in rows]
        unanswered, answered = (
            [question.conversation(with_answer, text) for question, text in zip(questions, before, strict=True)]
            for with_answer in (False, True)
        )
        inputs, prompts = encode(self.processor, answered, self.dtype), encode(self.processor, unanswered)
        answers = inputs["attention_mask"].sum(1) - prompts["attention_mask"].sum(1)
        digests = tuple(map(row_digest, questions))
        return Batch(inputs, answers, self._alignment([row["index"] for row in rows]), digests)

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

    def _loader(self, rows: datasets.Dataset, shares: "Shares") -> DataLoader[Any]:
        indexed = _Indexed(rows)
        return DataLoader(indexed, batch_sampler=shares, collate_fn=self.collate, num_workers=self.workers)  # type: ignore[arg-type]


def _drawn(below: int, random: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=random))


class Shares(Sampler[list[int]]):
    """One rank's rows of every step: of each `batch` rows in order, every world-th.

    Whole steps only where the order is shuffled, so that all ranks take as many steps; the last step of a fixed order
    may be short.
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
        self.length, self.batch, self.seed, self.rank, self.world = length, batch, seed, rank, world
        self.epoch, self.fixed = 0, fixed

    @property
    def sampler(self) -> "Shares":
        """Where Lightning looks for set_epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning as an epoch begins, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps = self.length // self.batch if self.seed is not None else -(-self.length // self.batch)
        return max(1, steps)

    def __iter__(self) -> Iterator[list[int]]:
        order, steps = torch.arange(self.length), torch.arange(len(self))
        if self.seed is not None:
            order = self._shuffled(self.length, 0 if self.fixed else self.epoch)
            steps = self._shuffled(len(self), self.epoch) if self.fixed and self.epoch else steps
        for step in steps.tolist():
            share = order[step * self.batch : (step + 1) * self.batch][self.rank :: self.world].tolist()
            # A rank that the last rows do not reach measures one of them again, so that no rank waits for another.
            yield share or [int(order[-1])]

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
