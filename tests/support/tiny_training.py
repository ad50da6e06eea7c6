"""What the tiny models of every family need to be trained and measured by the commands: a processor and a data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from transformers import BatchFeature

from . import tiny_vlm
from .tiny_vlm import Part, Tiny

USER, ASSISTANT, STOP = 87, 88, 89
"""Token ids: what opens a turn, and what closes the assistant's."""
_WORDS = 80
"""Ids of words are below."""
_THINGS = "cat dog owl hen fox bee ant cow".split()


class TinyProcessor:
    """A processor of a tiny model: each word is a token, and an image is the model's picture of the number that its
    first pixel holds."""

    chat_template = "tiny"

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.tokenizer = SimpleNamespace(padding_side="left", eos_token_id=STOP, batch_decode=_decode)

    def apply_chat_template(
        self, conversations: Sequence[list[dict[str, Any]]], add_generation_prompt: bool, **options: Any
    ) -> BatchFeature:
        """Left-padded inputs; other options change nothing here."""
        return tiny_vlm.batch(self.tiny, *(self._parts(turns, add_generation_prompt) for turns in conversations))

    def _parts(self, turns: list[dict[str, Any]], opened: bool) -> list[Part]:
        parts: list[Part] = []
        for turn in turns:
            parts.append(USER if turn["role"] == "user" else ASSISTANT)
            for item in turn["content"]:
                if item["type"] == "image":
                    parts.append(self.tiny.picture(item["image"].getpixel((0, 0))[0]))
                else:
                    parts += [1 + sum(word.encode()) % (_WORDS - 1) for word in item["text"].split()]
            parts += [STOP] if turn["role"] == "assistant" else []
        return [*parts, ASSISTANT] if opened else parts


def _decode(rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
    return [" ".join(str(int(token)) for token in row if token < _WORDS) for row in rows]


TILE, ROWS, HELD_OUT = 4, 40, 4
FAMILY_OPTIONS = {
    "transform": ["--compression", "2", "--transform.logit_batches", "2", "--transform.query_bank", "8"],
    "cross-layer": ["--compression", "2", "--transform.logit_batches", "2", "--transform.steps", "2"],
    "compact": ["--compression", "2", "--compact.bank", "16", "--compact.selector", "learned", "--compact.steps", "2"],
    "coded-compact": ["--compression", "4", "--coded.bank", "16"],
    "kvcapsule-paper": ["--compression", "2", "--optim.soft_steps", "2", "--optim.hard_steps", "2"],
}
"""What each recipe is given beside what all are."""


def data_words(source: str) -> list[str]:
    """Of any command that reads questions."""
    return ["--model", "tiny", "--data.source", source, "--data.split", "all", "--batch", "4", "--threads", "1"]


def trained(source: str, recipe: str, output: Path, *more: str) -> dict[str, Any]:
    """`kvcapsule train` for the model that `load_vlm` was made to give; returns the metrics.

    Args:
        source: a file of `questions`, ROWS of them.
        recipe: a key of FAMILY_OPTIONS.
        output: folder of the capsule.
        more: options.
    """
    from kvcapsule.training.main import main

    words = [*data_words(source), "--output", str(output), "--codec.tile", str(TILE), "--held_out", str(HELD_OUT)]
    assert main([recipe, *words, "--moment_batches", "6", "--device", "cpu", *FAMILY_OPTIONS[recipe], *more]) == 0
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())["train"]
    return metrics


def questions(folder: Path, count: int, first: int = 0) -> str:
    """Write so many questions, each about a picture of its own, from number `first` on; returns the file's path."""
    lines = []
    for index in range(first, first + count):
        path = folder / f"{index}.png"
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
        thing, other = _THINGS[index % 8], _THINGS[index * 3 % 7]
        prompt = f"{' '.join(_THINGS[: index % 4])} <image> what is the {thing}"
        lines.append({"image": str(path), "prompt": prompt, "answer": f"the {thing} is a {other}"})
    file = folder / f"questions-{first}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)
