"""Asked later, every kind of positions and layers answers as it would if asked first."""

from contextlib import nullcontext
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from support import tiny_vlm
from support.family_models import CASES, built
from transformers import BatchFeature

from kvcapsule.data.batches import Question
from kvcapsule.errors import InputError
from kvcapsule.eval import ask_later, batches, image_groups, prefixes
from kvcapsule.eval.ask_first import AskFirst
from kvcapsule.eval.ask_later import AskLater
from kvcapsule.inference.attach import attach
from kvcapsule.policy import Full
from kvcapsule.vlm.spans import VisualSpan, find_spans

TYPES = ["qwen2_vl", "qwen3_vl", "idefics3", "gemma3", "lfm2_vl"]
"""M-RoPE; features at several layers; images in parts; windows; convolutions."""
QUESTIONS = [((0,), "7 8 9"), ((1,), "4"), ((0, 1), "8 9 10 11"), ((0,), "3 3")]


@pytest.fixture
def encode(monkeypatch) -> None:
    """Prompts of tiny models, whose processors there are none of: the pictures by number, then the words' tokens."""

    def encode_questions(questions: Any, model: Any, tiny: Any) -> tuple[BatchFeature, list[VisualSpan]]:
        rows = [[5, *(tiny.picture(i.width - 1) for i in q.images), *map(int, q.prompt.split())] for q in questions]
        inputs = tiny_vlm.batch(tiny, *rows)
        return inputs, find_spans(model.config, inputs["input_ids"], inputs)

    for module in (batches, prefixes):
        monkeypatch.setattr(module, "encode_questions", encode_questions)
    for module in (ask_later, image_groups):
        monkeypatch.setattr(module, "read_question", lambda row, index: question(*QUESTIONS[index]))


def question(pictures: tuple[int, ...], prompt: str) -> Question:
    """With images by whose width `encode` tells the pictures."""
    return Question([Image.new("RGB", (1 + number, 1)) for number in pictures], prompt, "", "", ("",))


def blocks(model_type: str) -> tuple[Any, Any, list[AskLater]]:
    case = next(i for i, case in enumerate(CASES) if case.model_type == model_type)
    model, tiny = built(case).model, built(case).tiny
    rows = datasets.Dataset.from_dict({"task": [""] * len(QUESTIONS)})
    return model, tiny, list(AskLater.blocks(rows, model, tiny, 4, Progress(disable=True)))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_full_cache_answers_as_if_asked_first(encode, model_type: str) -> None:
    model, tiny, made = blocks(model_type)
    assert sum(len(part) for block in made for part in block.parts) == len(QUESTIONS)
    assert sum(len(block.prefixes.lengths) for block in made) == 3
    for method in (None, Full()):
        for block in made:
            with nullcontext() if method is None else attach(model, method):
                later = [ask(5) for ask in block.asks(model, method)]
            for part, answer in zip(block.parts, later, strict=True):
                for row, asked in enumerate(part):
                    pictures = next(p for p, words in QUESTIONS if words == asked.prompt)
                    (ask,) = AskFirst.of([question(pictures, asked.prompt)], model, tiny).asks(model, None)
                    first = ask(5)
                    assert torch.equal(answer.tokens[row], first.tokens[0])
                    for ours, theirs in zip(answer.logits, first.logits, strict=True):
                        torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-4)


def test_a_shared_prefill_keeps_the_positions_of_mrope(encode) -> None:
    """The answers of a block that was read before another one."""
    model, _, made = blocks("qwen2_vl")
    own = [[ask(5) for ask in block.asks(model, None)] for block in made]
    for block in made:
        block.record(model, hidden=False)
    for block, expected in reversed(list(zip(made, own, strict=True))):
        for method in (None, Full()):
            with nullcontext() if method is None else attach(model, method):
                for ask, one in zip(block.asks(model, method), expected, strict=True):
                    assert torch.equal(ask(5).tokens, one.tokens)


def test_a_model_whose_images_see_the_question_is_refused(encode) -> None:
    with pytest.raises(InputError, match=r"paligemma: its image tokens attend to the question .*ask-first"):
        blocks("paligemma")
