"""Batches of model inputs from a data set's rows, with the positions of the answers."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from kvcapsule.data.prompts import conversation, encode
from kvcapsule.data.source import images_of
from kvcapsule.errors import DataError, InputError
from kvcapsule.vlm.spans import VisualSpan, find_spans


class Batch(NamedTuple):
    """Left-padded inputs over prompts and answers."""

    inputs: BatchFeature
    spans: list[VisualSpan]
    answers: list[range]
    """Positions of each row's answer tokens before the end token (those that decoding feeds back). Empty if not
    requested."""


class Reader:
    """Iterates over the same batches at every pass; images are read lazily."""

    def __init__(self, rows: datasets.Dataset, model: PreTrainedModel, processor: ProcessorMixin, size: int) -> None:
        self.rows, self.model, self.processor, self.size = rows, model, processor, size
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def batches(self, answers: bool) -> Iterator[Batch]:
        """Batches of all rows, in order.

        Args:
            answers: whether to find the positions of the answers, which doubles the processor's time.

        Raises:
            DataError: if an image cannot be read or a text is missing; the message names the row.
            InputError: if the processor cannot encode the questions.
        """
        for start in range(0, len(self.rows), self.size):
            questions = [_read(self.rows, i) for i in range(start, min(start + self.size, len(self.rows)))]
            full, spans = self._encode([conversation(*question) for question in questions])
            positions = [range(0)] * len(questions)
            if answers:
                prompts, _ = self._encode([conversation(images, prompt) for images, prompt, _ in questions])
                positions = answer_positions(prompts, full, self.ends)
            yield Batch(full, spans, positions)

    def _encode(self, conversations: list[list[dict[str, Any]]]) -> tuple[BatchFeature, list[VisualSpan]]:
        try:
            inputs = encode(self.processor, conversations, self.model.dtype)
            return inputs, find_spans(self.model.config, inputs["input_ids"], inputs)
        except ValueError as error:
            raise InputError(f"the model's processor cannot take these questions: {error}") from error


def answer_positions(prompts: BatchFeature, full: BatchFeature, ends: Collection[int]) -> list[range]:
    """Positions of each row's answer: from the end of the common prefix of prompt and conversation to the first end
    token."""
    positions = []
    width = full["input_ids"].shape[1]
    for prompt, tokens in zip(_tokens(prompts), _tokens(full), strict=True):
        common = next(
            (i for i, (a, b) in enumerate(zip(prompt, tokens, strict=False)) if a != b), min(len(prompt), len(tokens))
        )
        stop = next((i for i in range(common, len(tokens)) if tokens[i] in ends), len(tokens))
        padding = width - len(tokens)
        positions.append(range(padding + common, padding + stop))
    return positions


def _tokens(inputs: BatchFeature) -> list[list[int]]:
    ids: torch.Tensor = inputs["input_ids"]
    mask: torch.Tensor = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)]


def _read(rows: datasets.Dataset, index: int) -> tuple[Sequence[Image.Image], str, str]:
    row = rows[index]
    for column in ("prompt", "answer"):
        if not isinstance(row[column], (str, int, float)):
            raise DataError(f"row {index}: the {column} is of type {type(row[column]).__name__}, expected text.")
    return images_of(row, index), str(row["prompt"]), str(row["answer"])
