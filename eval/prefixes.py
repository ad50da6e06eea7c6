"""Prompts cut behind their last visual token: the prefix, which questions about the same images share, and the question
behind it.

Shapes: Q questions, U prefixes, N tokens of a prompt, P of the longest prefix, S of the longest question.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from kvcapsule.data.batches import Question, encode_questions
from kvcapsule.errors import InputError
from kvcapsule.inference.transformers_api import prompt_positions
from kvcapsule.vlm.spans import find_spans

from .equal_bytes import Layout

_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"


class CutPrompt(NamedTuple):
    """One question's prompt, without padding."""

    question: Question
    ids: torch.Tensor
    """[N] int64."""
    positions: torch.Tensor | None
    """[..., N]: as generate gives them to the whole prompt; None: the model takes none."""
    end: int
    """Tokens up to the last visual one; 1 in a prompt without images."""


class Prefixes(NamedTuple):
    """Beginnings of prompts as one left-padded batch, on the model's device."""

    inputs: BatchFeature
    """Of the model's forward: their tokens and images."""
    layout: Layout
    lengths: list[int]
    """[U] tokens of each, padding not counted."""


def cut_prompts(questions: Sequence[Question], model: PreTrainedModel, processor: ProcessorMixin) -> list[CutPrompt]:
    """Cut each prompt behind its last visual token.

    Raises:
        InputError: if the processor cannot take them, or no text stands behind an image.
    """
    inputs, spans = encode_questions(questions, model, processor)
    valid, positions = inputs[_MASK].bool(), _positions(model, inputs)
    prompts = []
    for row, question in enumerate(questions):
        end = max((span.start + span.length for span in spans if span.row == row), default=0)
        kept = valid[row]
        ids = inputs[_IDS][row][kept]
        cut = max(1, int(kept[:end].sum()))
        if cut >= len(ids):
            raise InputError(
                f"the prompt of the question {question.prompt!r} ends with an image, so nothing can be asked later: let"
                " text stand behind the last image, or choose --protocol ask-first."
            )
        prompts.append(CutPrompt(question, ids, None if positions is None else positions[..., row, :][..., kept], cut))
    return prompts


def encode_prefixes(prompts: Sequence[CutPrompt], model: PreTrainedModel, processor: ProcessorMixin) -> Prefixes:
    """The prefixes of prompts, whose questions must have their images.

    Raises:
        InputError: if there are images, and no visual tokens.
    """
    encoded, _ = encode_questions([prompt.question for prompt in prompts], model, processor)
    valid, lengths = encoded[_MASK].bool(), [prompt.end for prompt in prompts]
    width = max(lengths)
    inputs: dict[str, Any] = {}
    for name, value in encoded.items():
        of_tokens = isinstance(value, torch.Tensor) and value.shape == valid.shape and not value.is_floating_point()
        inputs[name] = (
            _left_padded([row[kept][:end] for row, kept, end in zip(value, valid, lengths, strict=True)], width)
            if of_tokens
            else value
        )
    spans = find_spans(model.config, inputs[_IDS], inputs)
    if not spans and any(prompt.question.images for prompt in prompts):
        raise InputError(
            f"{model.config.model_type}: its prompts hold no visual tokens, so there is nothing to compress."
        )
    if prompts[0].positions is not None:
        inputs[_POSITIONS] = _left_padded([_known(prompt)[..., : prompt.end] for prompt in prompts], width, batch=-2)
    return Prefixes(BatchFeature(inputs).to(model.device), Layout(spans, inputs[_MASK].bool()), lengths)


def questions_behind(prompts: Sequence[CutPrompt], width: int, device: torch.device) -> BatchFeature:
    """Inputs of generate that go on behind a cache of the prompts' prefixes.

    Prefixes are padded on the left to `width` tokens, and each question on the left to the longest: a row may have
    padding before its prefix and between the two.
    """
    longest = max(len(prompt.ids) - prompt.end for prompt in prompts)

    def concatenated(rows: Sequence[torch.Tensor], batch: int = 0) -> torch.Tensor:
        ends = [prompt.end for prompt in prompts]
        before = _left_padded([row[..., :end] for row, end in zip(rows, ends, strict=True)], width, batch)
        behind = _left_padded([row[..., end:] for row, end in zip(rows, ends, strict=True)], longest, batch)
        return torch.cat([before, behind], dim=-1).to(device)

    inputs = {
        _IDS: concatenated([prompt.ids for prompt in prompts]),
        _MASK: concatenated([torch.ones_like(prompt.ids) for prompt in prompts]),
    }
    if prompts[0].positions is not None:
        inputs[_POSITIONS] = concatenated([_known(prompt) for prompt in prompts], batch=-2)
    return BatchFeature(inputs)


def _positions(model: PreTrainedModel, inputs: BatchFeature) -> torch.Tensor | None:
    """[..., Q, N] on the CPU."""
    on_device = inputs.to(model.device)
    positions = prompt_positions(model, on_device[_IDS], on_device)
    return None if positions is None else positions.cpu()


def _known(prompt: CutPrompt) -> torch.Tensor:
    assert prompt.positions is not None
    return prompt.positions


def _left_padded(rows: Sequence[torch.Tensor], width: int, batch: int = 0) -> torch.Tensor:
    """Rows [..., n] as one tensor of `width` in the last dimension, zeros on the left; `batch`: where the rows are."""
    padded = [torch.nn.functional.pad(row, (width - row.shape[-1], 0)) for row in rows]
    return torch.stack(padded, dim=batch)
