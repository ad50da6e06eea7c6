"""Where the answer of a question begins among the tokens of its row."""

import re

import torch
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin

from kvcapsule.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MASK = "assistant_masks"


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model reads; None where its config does not say."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def marks_answers(processor: ProcessorMixin) -> bool:
    """Whether the chat template says itself which tokens are the assistant's."""
    template = processor.chat_template
    templates = template.values() if isinstance(template, dict) else [template]
    return any(_GENERATION.search(str(text)) for text in templates)


def marked_lengths(inputs: BatchFeature, numbers: list[int]) -> torch.Tensor:
    """Tokens from each row's first marked one to its end, [B]; the mask is taken out of the inputs.

    numbers: of the rows, for messages.

    Raises:
        DataError: if a row has no marked token.
    """
    mask: torch.Tensor = torch.as_tensor(inputs.pop(_MASK)).bool()
    mask &= inputs["attention_mask"].bool()
    for number, row in zip(numbers, mask, strict=True):
        if not row.any():
            raise DataError(
                f"row {number}: the chat template marks no token of the answer; give a longer answer, or mend the"
                " template's generation block."
            )
    return mask.shape[1] - mask.int().argmax(1)


def lengths_behind_prompts(inputs: BatchFeature, prompts: BatchFeature, numbers: list[int]) -> torch.Tensor:
    """Tokens of each row behind its prompt with the assistant's turn opened, [B].

    Args:
        inputs: prompt and answer, left-padded.
        prompts: the same prompts, the assistant's turn opened.
        numbers: of the rows, for messages.

    Raises:
        DataError: if an opened prompt is not what the row begins with, or nothing is behind it.
    """
    lengths = []
    for number, row, prompt in zip(numbers, _tokens(inputs), _tokens(prompts), strict=True):
        if len(prompt) >= len(row) or not torch.equal(row[: len(prompt)], prompt):
            raise DataError(
                f"row {number}: the chat template opens an answer with other tokens than an answered turn begins with,"
                " so where the answer begins is not known (templates with a thinking block do this). Use a template"
                " that opens both alike, or has {% generation %} around the answer."
            )
        lengths.append(len(row) - len(prompt))
    return torch.tensor(lengths)


def require_readable(inputs: BatchFeature, longest: int | None, numbers: list[int]) -> None:
    """Raises DataError if a row has more tokens than the model reads; None sets no bound."""
    for number, count in zip(numbers, inputs["attention_mask"].sum(1).tolist(), strict=True):
        if longest is not None and count > longest:
            raise DataError(
                f"row {number}: prompt and answer are {count:,} tokens, and the model reads {longest:,} at most"
                " (max_position_embeddings): shorten them, or leave the row out."
            )


def _tokens(inputs: BatchFeature) -> list[torch.Tensor]:
    """Each row without its padding."""
    return [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
