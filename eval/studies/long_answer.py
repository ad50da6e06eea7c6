"""Bytes of the cache over a long answer, with and without R-KV: `python -m kvcapsule.eval.studies.long_answer`, or
`make long-answer`.

Answers are made to be long: the end token is suppressed, so past its own end an answer is whatever the model goes on
with. What is measured is the cache: its bytes at every token, and how often a method's likeliest next token is the full
cache's, while all write the full cache's answer.
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kvcapsule.atomic_files import to_json
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli.errors import complain
from kvcapsule.cli.results import command_line, shown_path, write_whole
from kvcapsule.data import source
from kvcapsule.data.source import SourceConfig
from kvcapsule.environment import machine, versions
from kvcapsule.errors import CapsuleError, DataError, GeometryError, InputError, ModelError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import RKV, Combined
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

from ..batches import Batch, make_batch, read
from ..entries import Entry, capsule_settings, full_entry
from ..report import scatter
from ..watched_generate import GREEDY, held_bytes, new_cache
from . import long_answer_page

PROG = "python -m kvcapsule.eval.studies.long_answer"


@dataclass(frozen=True)
class GrowthConfig:
    """What is measured, and where the result goes."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    capsule: str = "pages-vlm-transform"
    """The capsule that R-KV is joined with."""
    tokens: int = 512
    """Tokens of every answer."""
    questions: int = 4
    """Questions of the test split of pages, answered in one batch."""
    budget_tokens: int = 128
    """Of R-KV."""
    buffer: int = 128
    """Of R-KV."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    json: str | None = None
    """File for the result as JSON."""
    plot: str | None = None
    """File for the picture: .png, .svg or .pdf."""
    report: str | None = None
    """Markdown file with table and picture, written as a whole; needs --json and --plot, which it shows."""

    def __post_init__(self) -> None:
        for name in ("tokens", "questions"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: at least 1 is needed.")
        if self.plot is not None and Path(self.plot).suffix not in scatter.SUFFIXES:
            raise InputError(f"--plot {self.plot}: a picture's name ends in {', '.join(scatter.SUFFIXES)}.")
        if self.report is not None and None in (self.json, self.plot):
            raise InputError("--report shows the files of --json and --plot: give both.")


def main(argv: list[str] | None = None) -> int:
    """Measure, write the files that were asked for, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        config = auto_cli(GrowthConfig, args=words, as_positional=False)
        found = run(config, Console(stderr=True), command_line(PROG, words))
    except (InputError, CapsuleError, DataError, GeometryError, ModelError) as error:
        return complain(PROG, error)
    print(long_answer_page.table(found))
    if config.json is not None:
        write_whole(Path(config.json), to_json(found))
    if config.plot is not None:
        scatter.draw(long_answer_page.picture(found), Path(config.plot))
    if config.report is not None:
        write_whole(Path(config.report), (long_answer_page.page(found)).encode())
    return 0


def run(config: GrowthConfig, console: Console, command: str) -> dict[str, Any]:
    """Let every method write the same long answers, and return what was measured, under the keys of docs/eval-json.md
    where they fit.

    A row's `bytes` are those of the cache for one answer: when the first token is chosen, then after each token but the
    last, which nothing reads any more.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    model, processor = load_vlm(config.model)
    capsule = Capsule.from_pretrained(config.capsule)
    capsule.require_geometry(KVGeometry.from_config(model.config))
    data = SourceConfig(split="test", size=config.questions)
    asked = source.load(data)
    batch = make_batch([read(asked, i) for i in range(len(asked))], model, processor)
    taking_part = entries(config, capsule.to(model.device))
    rows: list[dict[str, Any]] = []
    answer: torch.Tensor | None = None
    with Progress(console=console) as progress:
        task = progress.add_task("tokens", total=len(taking_part) * config.tokens)
        for entry in taking_part:
            watch = write(model, batch, entry, config.tokens, answer, progress, task)
            likeliest = torch.stack(watch.likeliest, dim=1)
            answer = likeliest if answer is None else answer
            held = [total // len(asked) for total in watch.bytes]
            agreement = float((likeliest == answer).double().mean())
            rows.append({"method": entry.name, "settings": entry.settings, "agreement": agreement, "bytes": held})
    return {
        "model": shown_path(config.model),
        "data": asdict(data),
        "versions": versions(),
        "machine": machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": config.tokens,
        "rows": rows,
        "command": command,
    }


def entries(config: GrowthConfig, capsule: Capsule) -> list[Entry]:
    """The full cache and the capsule, each with R-KV and without, and R-KV on the prompt as well."""
    method = RKV(config.budget_tokens, config.buffer)
    held = {"budget_tokens": method.budget_tokens, "buffer": method.buffer}
    name, settings = capsule.config.family, capsule_settings(config.capsule, capsule)
    return [
        full_entry(),
        Entry("r-kv", method, "r-kv", held),
        Entry("r-kv, prompt as well", replace(method, scope="all"), "r-kv", {**held, "scope": "all"}),
        Entry(name, capsule, name, settings),
        Entry(f"{name} + r-kv", Combined(capsule, method), name, {**settings, **held}),
    ]


class Watch(LogitsProcessor):
    """Measures the cache at every token and notes the likeliest one; writes a given answer, if there is one."""

    def __init__(self, cache: Any, batch: Batch, answer: torch.Tensor | None, progress: Progress, task: TaskID) -> None:
        self.cache, self.batch, self.answer = cache, batch, answer
        self.progress, self.task = progress, task
        self.bytes: list[int] = []
        self.likeliest: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = len(self.bytes)
        self.bytes.append(held_bytes(self.cache, self.batch.layout).total)
        self.likeliest.append(scores.argmax(dim=-1))
        self.progress.advance(self.task)
        if self.answer is None:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(1, self.answer[:, place, None], 0.0)


def write(
    model: PreTrainedModel,
    batch: Batch,
    entry: Entry,
    tokens: int,
    answer: torch.Tensor | None,
    progress: Progress,
    task: TaskID,
) -> Watch:
    """Write `tokens` tokens, those of `answer` [B, tokens] or the method's own."""
    cache = new_cache(model, entry.method)
    watch = Watch(cache, batch, answer, progress, task)
    image = getattr(model.config, "image_token_id", None)
    with nullcontext() if entry.method is None else attach(model):
        cast("Any", model).generate(
            **batch.inputs,
            **cache_argument(cache),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            # An image token that is written looks like an image to whoever reads the sequence again.
            suppress_tokens=None if image is None else [image],
            logits_processor=LogitsProcessorList([watch]),
            **GREEDY,
        )
    return watch


if __name__ == "__main__":
    sys.exit(main())
