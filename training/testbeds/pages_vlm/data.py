"""Training batches of pages-vlm: patch labels of pages, and many questions packed after one image."""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor

from kvcapsule.testbeds.pages import LINES, TASKS, WORDS, Page, page, questions

from .model import GRID, PATCH, SPECIALS

IGNORE = -100
SYMBOLS = ("",) + tuple("0123456789") + WORDS
_TURNS = ("transcribe", "line", "lookup", "count", "line", "lookup", "count")
TASK_WEIGHT = {"transcribe": 1.0, "line": 1.125, "lookup": 2.0, "count": 1.25}
"""Loss weight of the answer tokens of each task; all different, because the log identifies tasks by them."""
_CHAINED = 0.25
"""Share of pages whose questions are consecutive turns of one chat; on the others a question sees the image alone."""


class PatchBatch(NamedTuple):
    """Pixels [B, 3, S, S] and labels of the T patches: symbol, line, column, and the line's word (0: none)."""

    pixel_values: torch.Tensor
    labels: torch.Tensor
    """[B, T, 4]."""


class TurnBatch(NamedTuple):
    """Packed question turns.

    pixel_values [B, 3, S, S]; input_ids, position_ids, labels, weights [B, N]; attention_mask [B, 1, N, N] bool.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    names: torch.Tensor
    """[B, T]: text token of the symbol whose centre lies in a visual token, or IGNORE."""
    keys: torch.Tensor
    """[B, N]: at every token of an answer, the text token of its question's key, or IGNORE if it has none."""


class Indices(Dataset[int]):
    """The page numbers start .. start + length."""

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> int:
        return self.start + i


def loader(
    collate: "PatchCollator | TurnCollator", start: int, steps: int, batch: int, workers: int = 1
) -> DataLoader[int]:
    return DataLoader(Indices(start, steps * batch), batch, collate_fn=collate, num_workers=workers)


class PatchCollator:
    """Collates page numbers into a PatchBatch."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, indices: list[int]) -> PatchBatch:
        drawn = [page("train", i) for i in indices]
        return PatchBatch(_pixels(self.processor, drawn), torch.stack([patch_labels(p) for p in drawn]))


def patch_labels(of: Page) -> torch.Tensor:
    """Labels [T, 4] of a page's patches: symbol, line, column and word of the line, all counted from 1, for the patch
    with a symbol's centre; 0 for other patches."""
    labels = torch.zeros(GRID * GRID, 4, dtype=torch.long)
    for mark in of.marks:
        at = int(mark.y // PATCH) * GRID + int(mark.x // PATCH)
        word = SYMBOLS.index(of.lines[mark.line][0])
        labels[at] = torch.tensor([SYMBOLS.index(mark.text), mark.line + 1, mark.column + 1, word])
    return labels


class TurnCollator:
    """Collates page numbers into a TurnBatch: one image, then several questions. A question sees the image and itself,
    or, if chained, all turns before it."""

    def __init__(self, processor: LlavaProcessor, lines: tuple[int, int] = LINES) -> None:
        """lines: smallest and largest number of lines of a page."""
        self.processor, self.lines = processor, lines
        tokenizer = processor.tokenizer
        ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in SPECIALS.items()}
        self.ids = ids
        self.prefix = [ids["user"]] + [ids["image"]] * (GRID * GRID)

    def __call__(self, indices: list[int]) -> TurnBatch:
        drawn = [page("train", i, lines=self.lines) for i in indices]
        rows = [self._row(p, np.random.default_rng([i, 7])) for p, i in zip(drawn, indices, strict=True)]
        length = max(len(row.ids) for row in rows)
        batch, n_prefix = len(rows), len(self.prefix)
        input_ids = torch.full((batch, length), self.ids["pad"])
        position_ids = torch.zeros(batch, length, dtype=torch.long)
        labels = torch.full((batch, length), IGNORE)
        weights = torch.zeros(batch, length)
        turn = torch.full((batch, length), -1)
        keys = torch.full((batch, length), IGNORE)
        for i, row in enumerate(rows):
            columns = (
                (input_ids, row.ids),
                (position_ids, row.positions),
                (labels, row.labels),
                (turn, row.turns),
                (keys, row.keys),
            )
            for target, part in columns:
                target[i, : len(part)] = torch.tensor(part)
            weights[i, : len(row.weights)] = torch.tensor(row.weights)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        prefix = torch.arange(length) < n_prefix
        mask = causal & (prefix[None, None, :] | (turn[:, :, None] == turn[:, None, :]))
        names = torch.full((batch, GRID * GRID), IGNORE)
        for i, of in enumerate(drawn):
            for mark in of.marks:
                names[i, int(mark.y // PATCH) * GRID + int(mark.x // PATCH)] = (
                    self.processor.tokenizer.convert_tokens_to_ids(mark.text)
                )
        return TurnBatch(
            _pixels(self.processor, drawn), input_ids, position_ids, mask[:, None], labels, weights, names, keys
        )

    def _row(self, of: Page, rng: np.random.Generator) -> "_Row":
        chained = rng.random() < _CHAINED
        tasks = tuple(rng.permutation(TASKS)) if chained else _TURNS
        n_prefix = len(self.prefix)
        blank = [IGNORE] * n_prefix
        row = _Row(list(self.prefix), list(range(n_prefix)), list(blank), [0.0] * n_prefix, [0] * n_prefix, list(blank))
        encode = self.processor.tokenizer.encode
        for k, question in enumerate(questions(of, rng, tasks)):
            opening = [self.ids["user"]] if chained and k else []
            prompt = opening + encode(question.prompt, add_special_tokens=False) + [self.ids["assistant"]]
            answer = encode(question.answer, add_special_tokens=False) + [self.ids["end"]]
            start = row.positions[-1] + 1 if chained else n_prefix
            key = IGNORE if question.key is None else self.processor.tokenizer.convert_tokens_to_ids(question.key)
            row.ids.extend(prompt + answer)
            row.positions.extend(range(start, start + len(prompt) + len(answer)))
            row.labels.extend([IGNORE] * len(prompt) + answer)
            row.weights.extend([0.0] * len(prompt) + [TASK_WEIGHT[question.task]] * len(answer))
            row.turns.extend([0 if chained else k + 1] * (len(prompt) + len(answer)))
            row.keys.extend([IGNORE] * len(prompt) + [key] * len(answer))
        return row


class _Row(NamedTuple):
    """Packed turns of one page, one list item per token; see TurnBatch."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    weights: list[float]
    turns: list[int]
    keys: list[int]


def _pixels(processor: LlavaProcessor, drawn: list[Page]) -> torch.Tensor:
    pixels: torch.Tensor = processor.image_processor([p.image for p in drawn], return_tensors="pt")["pixel_values"]
    return pixels
