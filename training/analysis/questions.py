"""A data set's rows as batches of a model's inputs, with the places of their answers."""

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
    """Positions of each row's answer, without the end token and what follows: the tokens that decoding feeds back.
    Empty where unknown."""


class Reader:
    """The same batches again at every pass. Images are read when their turn comes."""

    def __init__(self, rows: datasets.Dataset, model: PreTrainedModel, processor: ProcessorMixin, size: int) -> None:
        self.rows, self.model, self.processor, self.size = rows, model, processor, size
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def batches(self, answers: bool) -> Iterator[Batch]:
        """All rows in their order.

        Args:
            answers: whether the places of the answers are wanted; it takes the processor twice the time.

        Raises:
            DataError: naming the row, if an image cannot be read or there is no text.
            InputError: if the processor cannot make inputs of them.
        """
        for start in range(0, len(self.rows), self.size):
            asked = [_read(self.rows, i) for i in range(start, min(start + self.size, len(self.rows)))]
            full, spans = self._encode([conversation(*question) for question in asked])
            places = [range(0)] * len(asked)
            if answers:
                prompts, _ = self._encode([conversation(images, prompt) for images, prompt, _ in asked])
                places = answer_places(prompts, full, self.ends)
            yield Batch(full, spans, places)

    def _encode(self, conversations: list[list[dict[str, Any]]]) -> tuple[BatchFeature, list[VisualSpan]]:
        try:
            inputs = encode(self.processor, conversations, self.model.dtype)
            return inputs, find_spans(self.model.config, inputs["input_ids"], inputs)
        except ValueError as error:
            raise InputError(f"the model's processor cannot take these questions: {error}") from error


def answer_places(prompts: BatchFeature, full: BatchFeature, ends: Collection[int]) -> list[range]:
    """Where each row's answer lies: behind all that prompt and conversation have in common, up to the first end
    token."""
    places = []
    width = full["input_ids"].shape[1]
    for prompt, whole in zip(_tokens(prompts), _tokens(full), strict=True):
        common = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
        )
        stop = next((i for i in range(common, len(whole)) if whole[i] in ends), len(whole))
        padding = width - len(whole)
        places.append(range(padding + common, padding + stop))
    return places


def _tokens(inputs: BatchFeature) -> list[list[int]]:
    ids: torch.Tensor = inputs["input_ids"]
    mask: torch.Tensor = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[there].tolist() for row, there in zip(ids, mask, strict=True)]


def _read(rows: datasets.Dataset, index: int) -> tuple[Sequence[Image.Image], str, str]:
    row = rows[index]
    for column in ("prompt", "answer"):
        if not isinstance(row[column], (str, int, float)):
            raise DataError(f"row {index}: the {column} is of type {type(row[column]).__name__}, expected text.")
    return images_of(row, index), str(row["prompt"]), str(row["answer"])
