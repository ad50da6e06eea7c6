"""Bytes of the cache over a long answer, with and without R-KV: `python -m kvcapsule.eval.studies.long_answer`, or
`make long-answer`, which also writes docs/long-answer.md.

The end token is suppressed to make the answers long, so what follows the end of an answer means nothing. Measured are
the bytes of the cache at every token, and the share of tokens at which the method's likeliest next token is that of the
full cache, while the full cache's answer is written.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli import session
from kvcapsule.cli.progress import Stages
from kvcapsule.cli.results import STDOUT, shown_path, write_whole
from kvcapsule.data import source
from kvcapsule.data.batches import read_question
from kvcapsule.data.source import SourceConfig
from kvcapsule.environment import machine, versions
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import RKV, Combined
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

from ..batches import Batch, make_batch
from ..entries import Entry, capsule_settings, full_entry
from ..report import markdown
from ..report.picture import new_picture, save_picture
from ..report.picture_name import require_picture_name
from ..watched_generate import GREEDY, new_cache, stored_bytes
from .command import Study

_MODULE = "kvcapsule.eval.studies.long_answer"
PROG = f"python -m {_MODULE}"
_COLOURS = ("#555555", "#0072b2", "#56b4e9", "#000000", "#009e73")
"""Of Okabe and Ito's palette, which colour-blind readers can tell apart; methods in their order."""
_FILE, _JSON = Path("docs/long-answer.md"), "eval/results/long-answer.json"
_INTRODUCTION = (
    "Bytes of the cache of one answer while {tokens} tokens are written after a page and a question. `full` is"
    " transformers' own cache. A capsule makes the image small and lets the answer grow. `r-kv` keeps {budget} of the"
    " written tokens, beside a buffer of {buffer}; `r-kv, prompt as well` keeps as many of prompt and answer together."
)
_READING = (
    "The steps in the curves are the capacity that the buffer of the newest tokens reserves. While an answer is shorter"
    " than buffer and budget, R-KV drops nothing, and stores its observing queries in addition to the tokens."
)
_METHOD = (
    "The end token is suppressed to make answers long; past its own end an answer answers nothing. *Agreement* is how"
    " often a method's likeliest next token is the full cache's while the full cache's answer is written: how closely a"
    " method follows, not how well it answers. Bytes are measured from storages, reserved capacity and observing"
    " queries included, the codecs' parameters not."
)


@dataclass(frozen=True)
class LongAnswerConfig:
    """What is measured, and where the result is written."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    capsule: str = "pages-vlm-transform"
    """The capsule that is measured alone and combined with R-KV."""
    tokens: int = 512
    """Tokens of every answer."""
    questions: int = 4
    """Questions of the test split of pages, answered in one batch."""
    budget_tokens: int = 128
    """Token budget of R-KV."""
    buffer: int = 128
    """Buffer of R-KV, in tokens."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    json: str | None = None
    """File for the result as JSON; - prints it in place of the table."""
    plot: str | None = None
    """File for the picture: .png, .svg or .pdf."""
    report: str | None = None
    """Markdown page to write, with the table and the picture; needs --json and --plot."""

    def __post_init__(self) -> None:
        for name in ("tokens", "questions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: at least 1 is needed.")
        require_picture_name(self.plot)
        if self.report is not None and (self.json in (None, STDOUT) or self.plot is None):
            raise ConfigError("--report shows the files of --json and --plot: give both.")


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table or the JSON, write the files, and return the exit code."""
    return Study(
        PROG,
        LongAnswerConfig,
        usage="[--tokens N] [--json FILE] [--plot FILE] [--report FILE.md]",
        description="Measure the bytes of the cache while a long answer is written, with and without R-KV.",
        measure=lambda config, command: run(config, Console(stderr=True), command),
        show=lambda result: print(table(result)),
        files=("json", "plot", "report"),
        write=_write,
    ).main(argv)


def _write(result: dict[str, Any], config: LongAnswerConfig) -> None:
    """The picture and the page, where they are wanted."""
    if config.plot is not None:
        save_picture(picture(result), Path(config.plot))
    if config.report is not None:
        write_whole(Path(config.report), page(result).encode())


def run(config: LongAnswerConfig, console: Console, command: str) -> dict[str, Any]:
    """Let every method write the same long answers, and return the measurements, under keys of docs/eval-json.md where
    they fit.

    A row's `bytes` are those of the cache for one answer: when the first token is chosen, then after each token but the
    last one, which is never read.
    """
    session.begin(console, threads=config.threads, seed=0, device=None)
    model, processor = load_vlm(config.model)
    capsule = Capsule.from_pretrained(config.capsule)
    capsule.require_geometry(KVGeometry.from_config(model.config))
    data = SourceConfig(split="test", size=config.questions)
    questions = source.load(data)
    batch = make_batch([read_question(questions[i], i) for i in range(len(questions))], model, processor)
    methods = entries(config, capsule.to(model.device))
    rows: list[dict[str, Any]] = []
    answer: torch.Tensor | None = None
    with Stages(console) as progress:
        task = progress.add_task("tokens", total=len(methods) * config.tokens)
        for entry in methods:
            watch = Watch(new_cache(model, entry.method), batch, answer, progress, task)
            write(model, entry, config.tokens, watch)
            likeliest = torch.stack(watch.likeliest, dim=1)
            answer = likeliest if answer is None else answer
            stored = [total // len(questions) for total in watch.bytes]
            agreement = float((likeliest == answer).double().mean())
            rows.append({"method": entry.name, "settings": entry.settings, "agreement": agreement, "bytes": stored})
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


def entries(config: LongAnswerConfig, capsule: Capsule) -> list[Entry]:
    """The full cache and the capsule, each with R-KV and without, and R-KV on the prompt as well."""
    method = RKV(config.budget_tokens, config.buffer)
    sizes = {"budget_tokens": method.budget_tokens, "buffer": method.buffer}
    name, settings = capsule.config.family, capsule_settings(config.capsule, capsule)
    return [
        full_entry(),
        Entry("r-kv", method, "r-kv", sizes),
        Entry("r-kv, prompt as well", replace(method, scope="all"), "r-kv", {**sizes, "scope": "all"}),
        Entry(name, capsule, name, settings),
        Entry(f"{name} + r-kv", Combined(capsule, method), name, {**settings, **sizes}),
    ]


class Watch(LogitsProcessor):
    """Measures the cache at every token and records the likeliest token; forces the tokens of `answer` if there is
    one."""

    def __init__(self, cache: Any, batch: Batch, answer: torch.Tensor | None, progress: Progress, task: TaskID) -> None:
        self.cache, self.batch, self.answer = cache, batch, answer
        self.progress, self.task = progress, task
        self.bytes: list[int] = []
        self.likeliest: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.bytes)
        self.bytes.append(stored_bytes(self.cache, self.batch.layout).total)
        self.likeliest.append(scores.argmax(dim=-1))
        self.progress.advance(self.task)
        if self.answer is None:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(1, self.answer[:, step, None], 0.0)


def write(model: PreTrainedModel, entry: Entry, tokens: int, watch: Watch) -> None:
    """Write `tokens` tokens to the cache of `watch`: those of its answer, or the method's own."""
    image = getattr(model.config, "image_token_id", None)
    with nullcontext() if entry.method is None else attach(model):
        cast("Any", model).generate(
            **watch.batch.inputs,
            **cache_argument(watch.cache),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            # An image token in the answer would be taken for an image.
            suppress_tokens=None if image is None else [image],
            logits_processor=LogitsProcessorList([watch]),
            **GREEDY,
        )


def picture(result: Mapping[str, Any]) -> Figure:
    """One line a method, bytes over tokens."""
    figure, axes = new_picture(7.5, 4.8)
    for row, colour in zip(result["rows"], _COLOURS, strict=True):
        axes.plot([stored / 2**10 for stored in row["bytes"]], color=colour, linewidth=1.6, label=row["method"])
    axes.set_title(
        f"{result['model']}: {result['tokens']} tokens written behind a page and a question", loc="left", fontsize=11
    )
    axes.set_xlim(0, result["tokens"])
    axes.set_ylim(0)
    axes.set_xlabel("tokens written")
    axes.set_ylabel("cache, KiB an answer")
    axes.grid(color="#e5e5e5", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table of the cache's bytes at the first token, at most and at the last token."""
    head = ["method", "bytes at the first token", "at most", "at the last", "agreement"]
    lines = [head]
    for row in result["rows"]:
        stored: Sequence[int] = row["bytes"]
        sizes = (f"{n:,}" for n in (stored[0], max(stored), stored[-1]))
        lines.append([row["method"], *sizes, f"{row['agreement']:.3f}"])
    return markdown.grid(lines)


def page(result: Mapping[str, Any]) -> str:
    """The page, in Markdown; it shows the picture beside it and links to the JSON under eval/results/."""
    settings = next(row["settings"] for row in result["rows"] if row["method"] == "r-kv")
    data, machine = result["data"], result["machine"]
    processor = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    facts = (
        f"{result['model']} on {data['source']} ({data['split']}, seed {data['seed']}), {data['size']} questions in one"
        f" batch, {result['dtype']}; {processor}, {machine['threads']} threads; {packages}."
    )
    numbers = {"tokens": f"{result['tokens']:,}", "budget": settings["budget_tokens"], "buffer": settings["buffer"]}
    # The result may have been measured when the module had another name.
    command = re.sub(r"^python -m \S+", f"python -m {_MODULE}", result["command"])
    parts = [
        "# A long answer",
        markdown.paragraph(_INTRODUCTION.format(**numbers)),
        table(result),
        "![bytes of the cache over the written tokens](long-answer.png)",
        markdown.paragraph(_READING),
        markdown.paragraph(_METHOD),
        markdown.paragraph(facts),
        markdown.command_block(_FILE, command, _JSON, "Written by `make long-answer`, which runs this command"),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
