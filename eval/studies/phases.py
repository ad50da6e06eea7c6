"""A capsule whose tiles begin at blocks of the sequence, asked about images at every phase of a block.
`python -m kvcapsule.eval.studies.phases` prints how many answers are the full cache's.

A phase comes about in two ways: the prompts are as they are, and tiles are cut as if text of 0, 1, 2, ... tokens stood
before the image, which shows the phase alone; or such text does stand there. It is words of other questions, which the
demo VLM never saw in this place, nor did the capsule in training: the more of it, the stranger the keys and values.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli import session
from kvcapsule.cli.progress import tracked
from kvcapsule.cli.results import shown_path
from kvcapsule.cli.tables import NAME, Column, ReportTable, print_report
from kvcapsule.data import source
from kvcapsule.data.places import words_alone
from kvcapsule.data.source import SourceConfig
from kvcapsule.environment import machine, versions
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, CompressionPass, Method
from kvcapsule.vlm.loading import load_vlm
from kvcapsule.vlm.spans import find_spans

from ..batches import Batch, batches
from ..divergence import divergence
from ..equal_bytes import Layout
from ..quality import answered, texts
from ..scores.scorer import Scorer
from ..watched_generate import Generated, generate, new_cache
from .command import Study

PROG = "python -m kvcapsule.eval.studies.phases"
WAYS = {"phase": "phase alone", "text": "text before the image"}
"""Keys of the result, and what they stand for."""


@dataclass(frozen=True)
class PhasesConfig:
    """What is asked, and where the result is written."""

    capsule: str = "pages-vlm-blocks"
    """A capsule: a folder, a shipped name or an id on the Hub."""
    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    dtype: str = "float32"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    most: int | None = None
    """Numbers of tokens before the image go from 0 to one less than this. Default: the multiple at which the capsule's
    tiles begin, which is every phase; it must be given for a capsule whose tiles begin at an image's first token."""
    step: int = 1
    """From one number of tokens to the next."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(split="test", size=50))
    """The questions, asked at every phase."""
    batch: int = 16
    """Questions that are answered together."""
    max_new_tokens: int = 64
    """Most tokens of an answer, the end token included."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    json: str | None = None
    """File for the result as JSON; - prints it in place of the table."""

    def __post_init__(self) -> None:
        for name, count in (("step", self.step), ("batch", self.batch), ("most", self.most), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ConfigError(f"--{name} {count}: at least 1 is needed.")
        if self.max_new_tokens < 2:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens}: the first comes from the prefill; give 2 or more."
            )


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table or the JSON, write the file, and return the exit code."""
    return Study(
        PROG,
        PhasesConfig,
        usage="[--capsule ID] [--data.size N] [--step N] [--json FILE]",
        description="Ask about images that begin at every phase of a block, and compare with the full cache.",
        measure=lambda config, command: run(config, Console(stderr=True), command),
        show=lambda result: print_report(_table(result)),
    ).main(argv)


def _table(result: dict[str, Any]) -> ReportTable:
    same = ", ".join(f"{result[way]['same']} ({WAYS[way]})" for way in WAYS)
    title = f"{result['capsule']}: of {result['n']} answers, as with the full cache: {same}"
    titles = ("of", "phase alone:\nsame", "KL", "text:\nsame", "KL", "full cache\nright")
    table = ReportTable([Column("tokens before", NAME), *map(Column, titles)], title)
    for row in result["rows"]:
        cells = [str(row["before"]), str(row["n"])]
        for way in WAYS:
            cells += [str(row[way]["same"]), f"{row[way]['kl']:.2g}"]
        table.add(*cells, f"{row['accuracy']:.3f}")
    return table


def run(config: PhasesConfig, console: Console, command: str) -> dict[str, Any]:
    """Ask every question with its image at every phase, in both ways; a row for each number of tokens before.

    Raises:
        ConfigError: for a capsule whose tiles begin at an image's first token, if config.most is not given.
    """
    session.begin(console, threads=config.threads, seed=0, device=None)
    capsule = Capsule.from_pretrained(config.capsule)
    align = capsule.config.codec.align
    if align == 1 and config.most is None:
        raise ConfigError(
            f"--capsule {config.capsule}: its tiles begin at an image's first token, whatever stands before: give"
            " --most."
        )
    study = _Study(*load_vlm(config.model, dtype=config.dtype), capsule, config.max_new_tokens)
    questions = source.load(config.data)
    session.tell(console, questions.info.description)
    words = _tokens(study.processor, [words_alone(prompt) for prompt in questions["prompt"]])
    prompts = [
        (batch, study.answer(batch, None)) for batch in batches(questions, study.model, study.processor, config.batch)
    ]
    rows: list[dict[str, Any]] = []
    before = range(0, config.most or align, config.step)
    for count in tracked(before, "tokens before", len(before), console):
        # Other words for every number of them.
        text = words.roll(-(count * (count - 1) // 2))[:count]
        rows.append({"before": count, "n": len(questions), **study.at(prompts, text)})
    return {
        "capsule": shown_path(config.capsule),
        "model": shown_path(config.model),
        "dtype": config.dtype,
        "data": {**asdict(config.data), "source": shown_path(config.data.source)},
        "align": align,
        "tile": capsule.config.codec.tile,
        "n": sum(row["n"] for row in rows),
        **{way: {"same": sum(row[way]["same"] for row in rows)} for way in WAYS},
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
        "command": command,
    }


class _Study(NamedTuple):
    """What all phases have in common."""

    model: PreTrainedModel
    processor: ProcessorMixin
    capsule: Capsule
    max_new_tokens: int

    def at(self, prompts: Sequence[tuple[Batch, Generated]], text: torch.Tensor) -> dict[str, Any]:
        """Prompts, with the full cache's answers to them, at the phase that this text [N] before the image makes."""
        counted_on = _CountedOn(self.capsule, len(text))
        phase = [self.compare(batch, full, counted_on) for batch, full in prompts]
        behind = [_behind(self.model, batch, text) for batch, _ in prompts]
        answers = [(batch, self.answer(batch, None)) for batch in behind]
        right = [
            Scorer().score(question, answer).value
            for batch, full in answers
            for question, answer in zip(batch.questions, self.texts(full), strict=True)
        ]
        return {
            "phase": _total(phase),
            "text": _total([self.compare(batch, full, self.capsule) for batch, full in answers]),
            "accuracy": sum(right) / len(right),
        }

    def answer(self, batch: Batch, method: Method | None, forced: torch.Tensor | None = None) -> Generated:
        cache = new_cache(self.model, method)
        with nullcontext() if method is None else attach(self.model):
            return generate(self.model, batch.inputs, cache, batch.layout, self.max_new_tokens, forced)

    def texts(self, generated: Generated) -> list[str]:
        return texts(self.processor, self.model, generated.tokens)

    def compare(self, batch: Batch, full: Generated, method: Method) -> "_Agreement":
        """A method's answers to a batch beside the full cache's."""
        coded = self.answer(batch, method)
        through = coded if torch.equal(coded.tokens, full.tokens) else self.answer(batch, method, full.tokens)
        same = sum(mine == theirs for mine, theirs in zip(self.texts(coded), self.texts(full), strict=True))
        counted = answered(full.tokens, self.model.generation_config.eos_token_id)
        total = 0.0
        # The first token comes from the prefill, which is exact for every method.
        for step in range(1, counted.shape[1]):
            at = counted[:, step]
            total += float(divergence(full.logits[step][at], through.logits[step][at]).sum())
        return _Agreement(same, total, int(counted[:, 1:].sum()))


def _tokens(processor: ProcessorMixin, prompts: list[str]) -> torch.Tensor:
    """[N]: the token ids of all prompts, one after the other."""
    ids = processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for of_prompt in ids for token in of_prompt])


def _behind(model: PreTrainedModel, batch: Batch, text: torch.Tensor) -> Batch:
    """The batch with this text [N] before the first image of each row."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    firsts = {span.row: span.start for span in reversed(batch.layout.spans)}
    new_ids, new_mask = (
        torch.stack([torch.cat([x[row, : firsts[row]], y.to(x), x[row, firsts[row] :]]) for row in range(len(x))])
        for x, y in ((ids, text), (mask, torch.ones_like(text)))
    )
    inputs = BatchFeature({**batch.inputs, "input_ids": new_ids, "attention_mask": new_mask})
    return Batch(batch.questions, inputs, Layout(find_spans(model.config, new_ids, inputs), new_mask.bool()))


class _CountedOn(Method):
    """A method that takes each row to have so many more tokens before its first."""

    def __init__(self, method: Method, tokens: int) -> None:
        self.method, self.tokens = method, tokens

    def _later(self, prefill: LayerPrefill) -> LayerPrefill:
        return replace(prefill, before=[self.tokens] * len(prefill.valid))

    def compress(self, prefill: LayerPrefill) -> Compressed:
        return self.method.compress(self._later(prefill))

    def begin_pass(self, layers: Sequence[int]) -> CompressionPass:
        return _CountedOnPass(self.method.begin_pass(layers), self._later)


class _CountedOnPass:
    def __init__(self, compression: CompressionPass, later: Callable[[LayerPrefill], LayerPrefill]) -> None:
        self.compression, self.later = compression, later

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        return self.compression.add(self.later(prefill))


class _Agreement(NamedTuple):
    """Of one batch."""

    same: int
    divergence: float
    positions: int


def _total(batches: Sequence[_Agreement]) -> dict[str, Any]:
    positions = sum(batch.positions for batch in batches)
    return {
        "same": sum(batch.same for batch in batches),
        "kl": sum(batch.divergence for batch in batches) / max(1, positions),
    }


if __name__ == "__main__":
    sys.exit(main())
