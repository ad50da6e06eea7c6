"""Batches of questions with their answers, as a frozen VLM's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import datasets
import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BatchFeature, ProcessorMixin

from kvcapsule.data.batches import read_question
from kvcapsule.data.places import words_alone
from kvcapsule.data.prompts import encode
from kvcapsule.data.question_stream import QuestionStream
from kvcapsule.data.row_digest import row_digest

from .answers import lengths_behind_prompts, marked_lengths, marks_answers, require_readable
from .harvest import AT_SPANS, Alignment
from .rows_read import RowsRead
from .step_rows import SEEDS, Shares, Steps, StreamShares


class Batch(NamedTuple):
    """Left-padded inputs over prompt and answer."""

    inputs: BatchFeature
    answers: torch.Tensor
    """[B]: how many tokens the answer has, at the end of each row, what closes the turn included."""
    alignment: Alignment = AT_SPANS
    """Where its tiles begin."""
    digests: tuple[int, ...] = ()
    """Of its rows (kvcapsule.data.row_digest)."""


Rows: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"
"""Questions with the columns of `kvcapsule.data.source.load`."""


class Questions(L.LightningDataModule):
    """Training and held-out rows of one source, each an image, a prompt and the right answer.

    A step of `batch` rows is shared out among the ranks, so that a run on several sees the rows that a run on one sees.
    """

    def __init__(
        self,
        rows: Rows,
        held_out: Rows,
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

    @property
    def count(self) -> int:
        """Training questions, at most."""
        return len(self.rows)

    def shares(self, rank: int, world: int) -> Steps:
        """One rank's training rows of every step of an epoch."""
        return Shares(len(self.rows), self.batch, self.seed, rank, world, self.fixed)

    def numbered(self) -> Any:
        """What gives a row for each item of `shares`."""
        return _Indexed(self.rows)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch, at most."""
        return self.shares(*self._rank()).epoch_steps

    def first_epoch(self) -> DataLoader[Any]:
        """This rank's share of every step of the first epoch, shuffled."""
        return self._loader(self.numbered(), self.shares(*self._rank()))

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of every step that the trainer has left; without a trainer, the first epoch."""
        shares = self.shares(*self._rank())
        if self.trainer is not None and self.trainer.max_steps > 0:
            shares.run(self.trainer.global_step, self.trainer.max_steps)
        return self._loader(self.numbered(), shares)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(_Indexed(self.held_out), Shares(len(self.held_out), self.batch, None, *self._rank()))

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
        return torch.Generator().manual_seed(self.seed * SEEDS + number)

    def _rank(self) -> tuple[int, int]:
        """The number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, rows: Any, shares: Steps) -> DataLoader[Any]:
        return DataLoader(rows, batch_sampler=shares, collate_fn=self.collate, num_workers=self.workers)


def _drawn(below: int, random: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=random))


class _Indexed:
    """Rows that know their number, so that a bad one can be named."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.rows[i], "index": i}


class StreamedQuestions(Questions):
    """Those of a stream, which are read as steps take them; words before images are those of held-out questions."""

    def __init__(self, stream: QuestionStream, processor: ProcessorMixin, **options: Any) -> None:
        """options: those of Questions."""
        super().__init__(stream.first, stream.first, processor, **options)
        self.stream = stream

    @property
    def count(self) -> int:
        return len(self.stream)

    def shares(self, rank: int, world: int) -> Steps:
        return StreamShares(self.stream, self.batch, rank, world, self.fixed)

    def numbered(self) -> Any:
        return _AsTheyAre()


class _AsTheyAre:
    """Rows that a sampler holds itself: the process that reads the stream, from which workers get them."""

    def __getitem__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row
