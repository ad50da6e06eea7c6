"""The quality run: every method answers every question, and its answers, bytes and logits are compared with those of
the full cache."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import datasets
import torch
from rich.progress import Progress
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.data.batches import Question
from kvcapsule.inference.attach import attach
from kvcapsule.methods.method import Method

from .block import Block
from .divergence import divergence
from .entries import FULL, Entry
from .protocol_names import ASK_FIRST
from .protocols import PROTOCOLS
from .scores.scorer import Scorer
from .watched_generate import Generated, StoredBytes


@dataclass(frozen=True)
class Answering:
    """How questions are answered, and how the answers are judged."""

    batch: int
    """Questions of a batch."""
    max_new_tokens: int
    """Most tokens of an answer."""
    scorer: Scorer = Scorer()  # noqa: RUF009
    share_prefill: bool = False
    """Run the prefill of a batch once for all entries; the model must be `shared_prefill.replayable`."""
    protocol: str = ASK_FIRST
    """One of PROTOCOLS."""


@dataclass
class Tally:
    """Sums over the questions that a method has answered so far."""

    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Score of each answer, by task."""
    metrics: set[str] = field(default_factory=set)
    """Names of the metrics that the scores are of."""
    answers: list[str] = field(default_factory=list)
    """All answers, in the order of the blocks."""
    same: int = 0
    """Answers that equal the full cache's, character by character."""
    first_divergence: float = 0.0
    """Sum of KL(full || method) of the first tokens of the answers."""
    divergence: float = 0.0
    """Sum of KL(full || method) over positions; without the first of each answer where that is exact."""
    positions: int = 0
    """Positions in that sum."""
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens of the answers, end tokens included, by task."""
    visual: int = 0
    """Sum of bytes over batches."""
    total: int = 0
    """Sum of bytes over batches."""
    host: int = 0
    """Sum of bytes in the host's memory over batches."""
    parameters: int = 0
    """Bytes of the codecs' parameters: the most of all batches, which share them."""

    @property
    def count(self) -> int:
        """Questions answered."""
        return sum(map(len, self.scores.values()))

    def add_bytes(self, stored: StoredBytes) -> None:
        self.visual += stored.visual
        self.total += stored.total
        self.host += stored.host
        self.parameters = max(self.parameters, stored.parameters)


def prompt_bytes(model: PreTrainedModel, blocks: Sequence[Block], method: Method) -> int:
    """Bytes that a method stores of blocks of questions, visual and text together."""
    with attach(model, method):
        return sum(block.stored(model, method) for block in blocks)


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    entries: Sequence[Entry],
    answering: Answering,
    progress: Progress,
) -> dict[str, Tally]:
    """Let every entry answer every row.

    Args:
        model: a VLM, not attached.
        processor: its processor.
        rows: with the columns image, prompt, answer and task.
        entries: the full cache is the first.
        answering: the protocol, the size of batches and answers, and the metric.
        progress: shows a bar.

    Returns:
        Tallies by name of the entry.
    """
    if entries[0].name != FULL:
        raise ValueError("the full cache must be the first entry: the others are compared with its answers.")
    tallies = {entry.name: Tally() for entry in entries}
    task = progress.add_task("answers", total=len(rows) * len(entries))
    hidden = any(entry.method is not None and entry.method.needs_hidden_states for entry in entries)
    blocks = PROTOCOLS[answering.protocol].blocks
    for block in blocks(rows, model, processor, answering.batch, progress):
        if answering.share_prefill:
            block.record(model, hidden)
        references: list[Generated] = []
        for entry in entries:
            with nullcontext() if entry.method is None else attach(model, entry.method):
                asks = zip(block.parts, block.asks(model, entry.method), strict=True)
                for number, (questions, ask) in enumerate(asks):
                    generated = ask(answering.max_new_tokens)
                    if entry.name == FULL:
                        references.append(generated)
                    reference = references[number]
                    same = torch.equal(generated.tokens, reference.tokens)
                    teacher_forced = generated if same else ask(answering.max_new_tokens, reference.tokens)
                    tally = tallies[entry.name]
                    _add_answers(tally, model, processor, questions, generated, reference, answering.scorer)
                    positions = answered(reference.tokens, model.generation_config.eos_token_id)
                    _add_divergence(tally, positions, teacher_forced, reference, block.first_token_exact)
                    progress.advance(task, len(questions))
    return tallies


def _add_answers(
    tally: Tally,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    generated: Generated,
    reference: Generated,
    scorer: Scorer,
) -> None:
    tally.add_bytes(generated.stored)
    written = answered(generated.tokens, model.generation_config.eos_token_id)
    for question, ids, answer, full_answer in zip(
        questions,
        written,
        texts(processor, model, generated.tokens),
        texts(processor, model, reference.tokens),
        strict=True,
    ):
        score = scorer.score(question, answer)
        tally.scores[question.task].append(score.value)
        tally.metrics.add(score.metric)
        tally.answers.append(answer)
        tally.tokens[question.task] += int(ids.sum())
        tally.same += answer == full_answer


def _add_divergence(
    tally: Tally, positions: torch.Tensor, teacher_forced: Generated, reference: Generated, first_token_exact: bool
) -> None:
    """positions: [B, A] bool, the tokens of the full cache's answers; first_token_exact: see Block."""
    for step in range(positions.shape[1]):
        counted = positions[:, step]
        total = (
            0.0
            if reference is teacher_forced
            else float(divergence(reference.logits[step][counted], teacher_forced.logits[step][counted]).sum())
        )
        if step == 0:
            tally.first_divergence += total
            if first_token_exact:
                continue
        tally.divergence += total
        tally.positions += int(counted.sum())


def answered(tokens: torch.Tensor, end: int | list[int] | None) -> torch.Tensor:
    """[B, A] bool: True up to and including each row's first end token."""
    ends = (
        torch.isin(tokens, torch.tensor(end if isinstance(end, list) else [end], device=tokens.device))
        if end is not None
        else None
    )
    return torch.ones_like(tokens, dtype=torch.bool) if ends is None else ends.cumsum(1) - ends.long() == 0


def texts(processor: ProcessorMixin, model: PreTrainedModel, tokens: torch.Tensor) -> list[str]:
    """The answers as text, up to their end and without special tokens."""
    masks = answered(tokens, model.generation_config.eos_token_id)
    rows = [ids[mask].tolist() for ids, mask in zip(tokens, masks, strict=True)]
    decoded: list[str] = processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return decoded
