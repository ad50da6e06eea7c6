"""The model `kvcapsule` of lmms-eval: it has requests answered in batches, and reports what was measured."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from rich.console import Console
from rich.progress import Progress

from kvcapsule.cli.errors import complain
from kvcapsule.cli.progress import Stages
from kvcapsule.errors import InputError, KVCapsuleError

from .answers import Answerer
from .arguments import ModelArguments
from .measures import BatchMeasure, means, summary
from .rounds import Rounds
from .words import read_words

PROG = "lmms-eval --model kvcapsule"
_PROCESSES = "WORLD_SIZE"
"""Variable of accelerate and torchrun: the number of processes."""


@dataclass
class AnswerCounts(TokenCounts):
    """Counts of one question, as `lmms-eval --log_samples` writes them."""

    visual_tokens: int = 0
    visual_kv_bytes: int = 0
    """Of the question's batch, divided by its questions."""

    def to_dict(self) -> dict[str, int | None]:
        counts: dict[str, int | None] = super().to_dict()
        return {**counts, "visual_tokens": self.visual_tokens, "visual_kv_bytes": self.visual_kv_bytes}


class CapsuleModel(lmms):
    """See ModelArguments for what `--model_args` may name.

    Made by lmms-eval from a string, it ends the process with one line and code 2 for input that cannot be used; made by
    hand, it raises KVCapsuleError.
    """

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        """Load the model and the method.

        Raises:
            CapsuleError, ConfigError, GeometryError, InputError, ModelError: for arguments that cannot be used.
        """
        super().__init__()
        self.arguments = ModelArguments.of(arguments)
        device = None
        if int(os.environ.get(_PROCESSES, "1")) > 1:
            self.accelerator = Accelerator(cpu=self.arguments.device == "cpu")
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = str(self.accelerator.device)
        self.answerer = Answerer(self.arguments, device)
        self._exits = False

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "CapsuleModel":
        """From the words of `--model_args`, and those of lmms-eval's own options that concern the model."""
        try:
            model = cls(**read_words(arg_string, additional_config or {}))
        except KVCapsuleError as error:
            raise SystemExit(complain(PROG, error)) from error
        model._exits = True
        return model

    @property
    def device(self) -> torch.device:
        return self.answerer.model.device

    def clean(self) -> None:
        """Give the model's memory back, as lmms-eval asks for before it scores."""
        del self.answerer
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """One answer to each request, in their order."""
        results: dict[int, GenerationResult] = {}
        with self._answering(len(requests)) as report:
            for numbers, settings in self._batches(requests):
                chats = [_to_messages(requests[i])(self._row(requests[i])) for i in numbers]
                answers, measure = self.answerer.answer(chats, settings)
                for i, answer, counts in zip(numbers, answers, _counts(measure), strict=True):
                    results[i] = GenerationResult(text=answer, token_counts=counts)
                    self.cache_hook.add_partial("generate_until", (requests[i].args[0], settings), answer)
                report(measure, len(numbers))
        return [results[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds to each request; each round is a prompt of its own, as the task writes it."""
        results: dict[int, list[str]] = {}
        with self._answering(len(requests)) as report:
            for numbers, settings in self._batches(requests):
                rounds = {i: Rounds(self._row(requests[i]), _to_messages(requests[i])) for i in numbers}
                results |= {i: one.answers for i, one in rounds.items()}
                while chats := {i: chat for i, one in rounds.items() if (chat := one.messages()) is not None}:
                    answers, measure = self.answerer.answer(list(chats.values()), settings)
                    rounds = {i: rounds[i] for i in chats}
                    for one, answer in zip(rounds.values(), answers, strict=True):
                        one.answers.append(answer)
                    report(measure, 0)
                report(None, len(numbers))
        return [results[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: such a task compares numbers of the prefill, which no method changes."""
        with self._one_line():
            tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
            raise InputError(
                f"{tasks}: scored by log-likelihood, whose numbers come from the prefill, before anything is"
                " compressed; kvcapsule takes tasks whose answers are generated (output_type generate_until)."
            )

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except KVCapsuleError as error:
            if not self._exits:
                raise
            raise SystemExit(complain(PROG, error)) from error

    @contextmanager
    def _answering(self, total: int) -> Iterator[Any]:
        """Attached, with a bar; gives report(measure, questions done), and writes what was measured at the end."""
        measures: list[BatchMeasure] = []
        with self._one_line(), self.answerer.attached(), _progress(self.rank == 0) as progress:
            bar = progress.add_task("answers", total=total)

            def report(measure: BatchMeasure | None, done: int) -> None:
                measures.extend([] if measure is None else [measure])
                progress.advance(bar, done)

            yield report
        tokens = sum(sum(measure.new_tokens) for measure in measures)
        seconds = sum(measure.prefill + measure.decode for measure in measures)
        extra = {"total_requests": sum(measure.questions for measure in measures), **means(measures)}
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, extra)
        if self.rank == 0:
            sys.stderr.write(f"{PROG}: {summary(measures)}\n")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Numbers of requests that are generated alike, in their order, with their settings."""
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[repr(request.args[2])].append(i)
        for numbers in alike.values():
            for start in range(0, len(numbers), self.arguments.batch_size):
                yield numbers[start : start + self.arguments.batch_size], requests[numbers[0]].args[2]

    def _row(self, request: Instance) -> Mapping[str, Any]:
        """The row of the data set that a request is about."""
        *_, number, task, split = request.args
        row: Mapping[str, Any] = self.task_dict[task][split][number]
        return row


def _progress(shown: bool) -> Progress:
    return Stages(Console(stderr=True)) if shown else Progress(disable=True)


def _to_messages(request: Instance) -> Any:
    return request.args[1]


def _counts(measure: BatchMeasure) -> list[AnswerCounts]:
    share = measure.stored.visual // measure.questions
    return [
        AnswerCounts(output_tokens=new, visual_tokens=visual, visual_kv_bytes=share)
        for new, visual in zip(measure.new_tokens, measure.visual_tokens, strict=True)
    ]
