"""The protocol ask-first: the question is read together with the image, and the whole prompt is compressed behind it.

The prefill is exact for every method, and so is the first token of every answer; policies see the question.
"""

from collections.abc import Iterator, Sequence

import datasets
import torch
from rich.progress import Progress
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.data.batches import Question
from kvcapsule.methods.method import Method

from .batches import Batch, batches, by_task, make_batch
from .block import Ask, Block, TimedRun
from .shared_prefill import CompressedLayers, Prefill
from .watched_generate import Generated, generate, new_cache, record


class AskFirst(Block):
    """A block of one part: a batch of whole prompts."""

    first_token_exact = True

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.prefill: Prefill | None = None

    @classmethod
    def of(cls, questions: list[Question], model: PreTrainedModel, processor: ProcessorMixin) -> "AskFirst":
        """One block of these questions; see `make_batch`."""
        return cls(make_batch(questions, model, processor))

    @classmethod
    def blocks(
        cls, rows: datasets.Dataset, model: PreTrainedModel, processor: ProcessorMixin, size: int, progress: Progress
    ) -> Iterator["AskFirst"]:
        """All rows, task by task; see `batches`."""
        return map(cls, batches(by_task(rows), model, processor, size))

    @property
    def parts(self) -> Sequence[Sequence[Question]]:
        return [self.batch.questions]

    def record(self, model: PreTrainedModel, hidden: bool) -> None:
        self.prefill = record(model, self.batch.inputs, self.batch.layout, hidden)

    def asks(self, model: PreTrainedModel, method: Method | None) -> Iterator[Ask]:
        compressed: CompressedLayers = {}

        def ask(max_new_tokens: int, forced: torch.Tensor | None = None) -> Generated:
            inputs, layout = self.batch.inputs, self.batch.layout
            cache = new_cache(model, method)
            return generate(model, inputs, cache, layout, max_new_tokens, forced, self.prefill, compressed)

        yield ask

    def stored(self, model: PreTrainedModel, method: Method) -> int:
        return sum(ask(1).stored.total for ask in self.asks(model, method))

    def timed_run(self, model: PreTrainedModel) -> TimedRun:
        return TimedRun(self.batch.inputs, None)
