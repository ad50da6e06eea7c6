"""The quality run: every method answers every question; answers, bytes and logits are compared with those of the full
cache."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest

import datasets
import torch
from rich.progress import Progress
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.inference.attach import attach
from kvcapsule.methods.method import Method

from .batches import Batch, batches
from .entries import FULL, Entry
from .metrics import accuracy, divergence
from .shared_prefill import Made, Prefill
from .watched_generate import Generated, Held, generate, new_cache, record


@dataclass
class Tally:
    """What a method did on the questions so far."""

    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Accuracy of each answer, by task."""
    same: int = 0
    """Answers that are the full cache's, character by character."""
    divergence: float = 0.0
    """Sum of KL(full || method) over positions."""
    positions: int = 0
    """Positions in that sum."""
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens of the answers, end tokens included, by task."""
    visual: int = 0
    """Sum of bytes over batches."""
    total: int = 0
    """Sum of bytes over batches."""
    host: int = 0
    """Sum of bytes over batches, of what methods keep in the host's memory."""
    parameters: int = 0
    """The most bytes that were read at once; they are the same ones for every batch."""

    @property
    def count(self) -> int:
        """Questions answered."""
        return sum(map(len, self.scores.values()))

    def add_bytes(self, held: Held) -> None:
        self.visual += held.visual
        self.total += held.total
        self.host += held.host
        self.parameters = max(self.parameters, held.parameters)


def prompt_bytes(
    model: PreTrainedModel, prompts: Sequence[Batch], method: Method, prefills: Sequence[Prefill | None] = ()
) -> int:
    """Bytes that a method stores of prompts, visual and text together, measured right after prefill.

    prefills: one for each of the prompts, or none at all; without, it is run.
    """
    with attach(model, method):
        return sum(
            generate(model, p.inputs, new_cache(model, method), p.layout, max_new_tokens=1, prefill=prefill).held.total
            for p, prefill in zip_longest(prompts, prefills)
        )


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    entries: Sequence[Entry],
    size: int,
    max_new_tokens: int,
    progress: Progress,
    share: bool = False,
) -> dict[str, Tally]:
    """Let every entry answer every row.

    Args:
        model: a VLM, not attached.
        processor: its processor.
        rows: with the columns image, prompt, answer and task.
        entries: the full cache is the first.
        size: questions in a batch.
        max_new_tokens: most tokens of an answer.
        progress: shows a bar.
        share: run the prefill of a batch once and give it to all entries, where the model allows it
            (`replay.replayable`).

    Returns:
        By name of the entry.
    """
    if entries[0].name != FULL:
        raise ValueError("the full cache must be the first entry: the others are compared with its answers.")
    tallies = {entry.name: Tally() for entry in entries}
    task = progress.add_task("answers", total=len(rows) * len(entries))
    hidden = any(entry.method is not None and entry.method.needs_hidden_states for entry in entries)
    for batch in batches(by_task(rows), model, processor, size):
        prefill = record(model, batch.inputs, batch.layout, hidden) if share else None
        reference: Generated | None = None
        for entry in entries:
            made: Made = {}
            with nullcontext() if entry.method is None else attach(model, entry.method):
                cache = new_cache(model, entry.method)
                given = generate(model, batch.inputs, cache, batch.layout, max_new_tokens, prefill=prefill, made=made)
                reference = reference or given
                teacher_forced = given
                if not torch.equal(given.tokens, reference.tokens):
                    cache = new_cache(model, entry.method)
                    teacher_forced = generate(
                        model, batch.inputs, cache, batch.layout, max_new_tokens, reference.tokens, prefill, made
                    )
            _add(tallies[entry.name], model, processor, batch, given, teacher_forced, reference)
            progress.advance(task, len(batch.questions))
    return tallies


def by_task(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows, those of a task together: a batch takes as many steps as its longest answer, and a task's answers are
    alike in length."""
    tasks = list(rows["task"])
    places = {task: place for place, task in enumerate(dict.fromkeys(tasks))}
    return rows.select(sorted(range(len(rows)), key=lambda i: places[tasks[i]]))


def _add(
    tally: Tally,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Batch,
    given: Generated,
    teacher_forced: Generated,
    reference: Generated,
) -> None:
    tally.add_bytes(given.held)
    written = answered(given.tokens, model.generation_config.eos_token_id)
    for question, ids, own, theirs in zip(
        batch.questions,
        written,
        texts(processor, model, given.tokens),
        texts(processor, model, reference.tokens),
        strict=True,
    ):
        tally.scores[question.task].append(accuracy(question.task, own, question.answer))
        tally.tokens[question.task] += int(ids.sum())
        tally.same += own == theirs
    positions = answered(reference.tokens, model.generation_config.eos_token_id)
    # The first token comes out of the prefill, which is exact for every method: only the others show what was read from
    # the cache.
    for step in range(1, positions.shape[1]):
        asked = positions[:, step]
        if reference is not teacher_forced:
            tally.divergence += float(
                divergence(reference.logits[step][asked], teacher_forced.logits[step][asked]).sum()
            )
        tally.positions += int(asked.sum())


def answered(tokens: torch.Tensor, end: int | list[int] | None) -> torch.Tensor:
    """[B, A] bool: True up to and including each row's first end token."""
    ends = (
        torch.isin(tokens, torch.tensor(end if isinstance(end, list) else [end], device=tokens.device))
        if end is not None
        else None
    )
    return torch.ones_like(tokens, dtype=torch.bool) if ends is None else ends.cumsum(1) - ends.long() == 0


def texts(processor: ProcessorMixin, model: PreTrainedModel, tokens: torch.Tensor) -> list[str]:
    """The answers as text, without special tokens and what follows the end."""
    kept = answered(tokens, model.generation_config.eos_token_id)
    rows = [ids[mask].tolist() for ids, mask in zip(tokens, kept, strict=True)]
    decoded: list[str] = processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return decoded
