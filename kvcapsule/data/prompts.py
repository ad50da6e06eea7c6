"""Questions as a model's inputs, by its processor and chat template."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from ..errors import InputError, ModelError
from .places import IMAGE, pieces


def conversation(
    images: Sequence[Image.Image], prompt: str, answer: str | None = None, before: str = ""
) -> list[dict[str, Any]]:
    """One question (and its answer) in transformers' chat form, behind other text: the images at their places
    `<image>`, or else before the prompt.

    Raises:
        InputError: if there are places for more or fewer images.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    parts = [{"type": "image", "image": image} for image in images]
    texts = pieces(prompt)
    if len(texts) == 1:
        content += [*parts, {"type": "text", "text": prompt}]
    elif len(texts) == len(images) + 1:
        for text, part in zip_longest(texts, parts):
            content += [{"type": "text", "text": text}] if text else []
            content += [part] if part else []
    else:
        raise InputError(f"the prompt has {len(texts) - 1} places {IMAGE}, but there are {len(images)} images.")
    turns = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def encode(
    processor: ProcessorMixin,
    conversations: Sequence[list[dict[str, Any]]],
    dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    mark_answers: bool = False,
) -> BatchFeature:
    """A left-padded batch of the model's inputs. After a user's last turn, the assistant's turn is opened.

    Args:
        processor: of the model.
        conversations: as `conversation` builds them; all end with a turn of the same role.
        dtype: of the inputs that are not integers; None keeps that of the processor.
        options: of the processor, such as num_frames of a video.
        mark_answers: whether to give the chat template's mask of the assistant's tokens too, as "assistant_masks".

    Raises:
        ModelError: if the processor has no chat template.
        InputError: for a text with half of a surrogate pair, which no tokenizer takes.
    """
    for turns in conversations:
        _require_text(turns)
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(
            f"{type(processor).__name__} has no chat template: use an instruction-tuned model, or set"
            " processor.chat_template."
        )
    processor.tokenizer.padding_side = "left"
    opened = conversations[0][-1]["role"] == "user"
    chat: Any = processor.apply_chat_template
    batch: BatchFeature = chat(
        list(conversations),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=opened,
        processor_kwargs={"padding": True, **(options or {})},
        return_assistant_tokens_mask=mark_answers,
    )
    if dtype is not None:
        batch = BatchFeature(
            {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
        )
    return batch


def _require_text(conversation: list[dict[str, Any]]) -> None:
    """Raises InputError for a text of the conversation that cannot be encoded."""
    contents = (turn.get("content") for turn in conversation)
    items = [item for content in contents for item in (content if isinstance(content, list) else [content])]
    for item in items:
        text = item.get("text") if isinstance(item, Mapping) else item
        try:
            str(text or "").encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"a prompt holds half of a surrogate pair at character {error.start + 1}: give text in Unicode."
            ) from error
