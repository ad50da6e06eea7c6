"""Questions that are asked of every method in turn: what the protocols have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from transformers import BatchFeature, PreTrainedModel
from transformers.cache_utils import Cache

from kvcapsule.data.batches import Question
from kvcapsule.methods.method import Method

from .watched_generate import Generated


class Ask(Protocol):
    """Asks the questions of one part of a block of one method; within `attach`, if there is a method."""

    def __call__(self, max_new_tokens: int, forced: torch.Tensor | None = None) -> Generated:
        """Answers, greedily.

        Args:
            max_new_tokens: most tokens of an answer, the end token included.
            forced: [B, A] tokens to write in place of the likeliest ones (teacher forcing).
        """


class TimedRun(NamedTuple):
    """Prompts as the timing runs them."""

    inputs: BatchFeature
    """Of generate."""
    begin: Callable[[Cache], None] | None
    """What fills the cache before generate is called, and is part of the prefill's time; None: nothing."""


class Block(ABC):
    """Questions whose prefill is shared by all methods.

    Each method is given the same recorded prefill, or runs its own where none was recorded.
    """

    first_token_exact: ClassVar[bool]
    """Whether the first token of an answer is exact under any method, as nothing compressed is read for it."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Sequence[Question]]:
        """The questions that are answered together, part by part."""

    @abstractmethod
    def record(self, model: PreTrainedModel, hidden: bool) -> None:
        """Run the prefill and keep its recording for all methods; the model must be `shared_prefill.replayable`.

        hidden: whether to record hidden states too.
        """

    @abstractmethod
    def asks(self, model: PreTrainedModel, method: Method | None) -> Iterator[Ask]:
        """For each part, in their order, what asks it of a method; None is the full cache."""

    @abstractmethod
    def stored(self, model: PreTrainedModel, method: Method) -> int:
        """Bytes that a method stores of all questions of the block, visual and text together, on the device and without
        parameters; within `attach`."""

    @abstractmethod
    def timed_run(self, model: PreTrainedModel) -> TimedRun:
        """The prompts of the block as the timing runs them; for a block made by `of`."""
