"""Training batches of smol-vlm: pictures of three data sets, many questions packed after one image.

Shapes: B pictures, T visual tokens of one, N tokens of a row.
"""

from typing import NamedTuple

import numpy as np
import torch
from transformers import LlavaProcessor

from kvcapsule.data.prompts import conversation
from kvcapsule.testbeds import easy_vqa, emoji, words
from kvcapsule.testbeds.pages import Question
from kvcapsule.testbeds.picture import Picture

from ..stage import IGNORE

TASKS = tuple(
    f"{name}-{task}" for name, of in (("emoji", emoji), ("easy-vqa", easy_vqa), ("words", words)) for task in of.TASKS
)
QUESTIONS = 9
"""Largest number of questions per picture."""
_SHARES = (0.45, 0.7)
"""Cumulative shares of emoji scenes and easy-VQA pictures; the rest are words."""


class TurnBatch(NamedTuple):
    """Packed turns: pixel_values [B, 3, S, S]; input_ids, position_ids, labels [B, N]; attention_mask [B, 1, N, N]
    bool."""

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    """Next token at each position (already shifted by one); IGNORE outside answers."""
    tasks: torch.Tensor
    """[B, N]: index in TASKS of the question of an answer token, or IGNORE."""
    turns: torch.Tensor
    """[B, N]: number of the turn, counted over the batch; IGNORE in prefix and padding."""


class NameBatch(NamedTuple):
    """Pixels [B, 3, S, S] and the object in each visual token [B, T]: an index into the names, 0 for none."""

    pixel_values: torch.Tensor
    names: torch.Tensor


class Mixture:
    """Maps a number to a training picture; a pure function."""

    def __call__(self, index: int) -> tuple[str, Picture]:
        """Name of the data set, and picture."""
        rng = np.random.default_rng([index, 11])
        share = rng.random()
        if share < _SHARES[0]:
            return "emoji", emoji.scene("train", index)
        if share < _SHARES[1]:
            pictures = easy_vqa.shapes("train")
            return "easy-vqa", pictures[int(rng.integers(len(pictures)))]
        return "words", words.sign("train", index)


def token_classes() -> tuple[str, ...]:
    """Class labels of visual tokens; the first one is for the background."""
    shapes = [f"{colour} {shape}" for colour in easy_vqa.COLOURS for shape in easy_vqa.SHAPES]
    return ("background", *emoji.NAMES.values(), *shapes, *words.WORDS)


class NameCollator:
    """Collates picture numbers into a NameBatch."""

    def __init__(self, processor: LlavaProcessor, draw: Mixture, grid: int) -> None:
        self.processor, self.draw, self.grid = processor, draw, grid
        self.name_index = {name: i for i, name in reversed(list(enumerate(token_classes())))}

    def __call__(self, indices: list[int]) -> NameBatch:
        drawn = [self.draw(i)[1] for i in indices]
        return NameBatch(_pixels(self.processor, drawn), torch.stack([self._names(p) for p in drawn]))

    def _names(self, of: Picture) -> torch.Tensor:
        """Labels [T]: the object at the centre of each token; IGNORE if its full name is unknown."""
        labels = torch.zeros(self.grid, self.grid, dtype=torch.long)
        across, down = (length / self.grid for length in of.image.size)
        middle = torch.arange(self.grid) + 0.5
        for thing in of.things:
            rows = (middle * down >= thing.top) & (middle * down < thing.bottom)
            columns = (middle * across >= thing.left) & (middle * across < thing.right)
            labels[rows[:, None] & columns[None]] = self.name_index.get(thing.name, IGNORE)
        return labels.flatten()


class TurnCollator:
    """Collates picture numbers into a TurnBatch: one image, then several questions, each seeing the image and
    itself."""

    def __init__(self, processor: LlavaProcessor, draw: Mixture, image_tokens: int) -> None:
        self.processor, self.draw = processor, draw
        self.tokenizer = processor.tokenizer
        head = self._render("", None).split(processor.image_token)[0]
        self.prefix = self._ids(head) + [processor.image_token_id] * image_tokens
        self.pad = self.tokenizer.pad_token_id

    def __call__(self, indices: list[int]) -> TurnBatch:
        drawn = [(*self.draw(i), np.random.default_rng([i, 12])) for i in indices]
        rows = [self._row(name, of, rng) for name, of, rng in drawn]
        length, n_prefix = max(len(row.ids) for row in rows), len(self.prefix)
        blanks = (self.pad, 0, IGNORE, IGNORE, IGNORE)
        columns = [torch.full((len(rows), length), blank) for blank in blanks]
        first = 0
        for i, row in enumerate(rows):
            for column, part in zip(columns, row, strict=True):
                column[i, : len(part)] = torch.tensor(part)
            turns = columns[4][i]
            turns[turns != IGNORE] += first
            first = max(first, int(turns.max()) + 1)
        input_ids, position_ids, labels, tasks, turns = columns
        prefix = torch.arange(length) < n_prefix
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (
            prefix[None, None, :] | (turns[:, :, None] == turns[:, None, :])
        )
        pixels = _pixels(self.processor, [of for _, of, _ in drawn])
        return TurnBatch(pixels, input_ids, position_ids, mask[:, None], labels, tasks, turns)

    def _row(self, name: str, of: Picture, rng: np.random.Generator) -> "_Row":
        n_prefix = len(self.prefix)
        blank = [IGNORE] * n_prefix
        row = _Row(list(self.prefix), list(range(n_prefix)), list(blank), list(blank), list(blank))
        for turn, question in enumerate(_some(of.questions, rng)):
            prompt, answer = self.turn(question)
            length, silent = len(prompt) + len(answer), len(prompt) - 1
            row.ids.extend(prompt + answer)
            row.positions.extend(range(n_prefix, n_prefix + length))
            row.labels.extend([IGNORE] * silent + answer + [IGNORE])
            row.tasks.extend([IGNORE] * silent + [TASKS.index(f"{name}-{question.task}")] * len(answer) + [IGNORE])
            row.turns.extend([turn] * length)
        return row

    def turn(self, question: Question) -> tuple[list[int], list[int]]:
        """Tokens between the image and the answer, and of the answer with its end token, as the chat template writes
        them."""
        prompt = self._render(question.prompt, None).split(self.processor.image_token)[1]
        text = self._render(question.prompt, question.answer).split(self.processor.image_token)[1]
        answer = self._ids(text.removeprefix(prompt))
        return self._ids(prompt), answer[: answer.index(self.tokenizer.eos_token_id) + 1]

    def _render(self, prompt: str, answer: str | None) -> str:
        chat = conversation([], prompt, answer)
        chat[0]["content"].insert(0, {"type": "image"})
        rendered: str = self.processor.apply_chat_template(chat, add_generation_prompt=answer is None, tokenize=False)
        return rendered

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


class _Row(NamedTuple):
    """Packed turns of one picture, one list item per token; see TurnBatch."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    tasks: list[int]
    turns: list[int]


def _some(questions: tuple[Question, ...], rng: np.random.Generator) -> list[Question]:
    """At most QUESTIONS of the questions, in random order."""
    return [questions[i] for i in rng.permutation(len(questions))[:QUESTIONS]]


def _pixels(processor: LlavaProcessor, drawn: list[Picture]) -> torch.Tensor:
    pixels: torch.Tensor = processor.image_processor([p.image for p in drawn], return_tensors="pt")["pixel_values"]
    return pixels
