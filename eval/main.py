"""`kvcapsule eval`: capsules and training-free methods against the full cache, on the same questions, in one run."""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import Any

import datasets
import torch
import transformers
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.capsule import Capsule, CapsuleError
from kvcapsule.cli.errors import InputError, complain
from kvcapsule.codec.kvcapsule import check_ratio
from kvcapsule.data import source
from kvcapsule.data.source import DataError, SourceConfig
from kvcapsule.geometry import KVGeometry, full_attention_layers
from kvcapsule.hub import METRICS_FILE
from kvcapsule.models import load_vlm

from . import plot
from .machine import machine, versions
from .matching import TOLERANCE, match_ratios
from .methods import FULL, RIVALS, chosen, entries, open_capsules, shown_path
from .report import answer_tokens, rows, tables, write_json
from .runner import evaluate, survey
from .timing import time_entries

PROG = "kvcapsule eval"
_LISTS = ("--capsule", "--methods")
"""Options that may be given several times."""
_WIDE = 160
"""Columns of a table that is not printed to a terminal."""


@dataclass(frozen=True)
class EvalConfig:
    """What is compared, on what, and where the result goes."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: str = "auto"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Where it runs, such as cpu or cuda:1; by default CUDA where there is one."""
    capsule: list[str] = field(default_factory=list)
    """A capsule: a folder, a shipped name or an id on the Hub. May be repeated; the bytes of the first are those that pruning is given."""
    ratio: float | None = None
    """Without a capsule: share of the visual tokens that pruning keeps, in (0, 1]. With one it is chosen so that bytes are equal."""
    methods: list[str] = field(default_factory=list)
    """Compare only these rows with the full cache, e.g. evenly-spaced; may be repeated. By default all."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(split="test", size=200))
    """Where the questions come from."""
    batch: int = 16
    """Questions that are answered together."""
    max_new_tokens: int = 64
    """Most tokens of an answer, the end token included."""
    timing: bool = True
    """Whether prefill and decode are timed."""
    json: str | None = None
    """File for the result as JSON (docs/eval-json.md says what is in it)."""
    plot: str | None = None
    """File for a picture, accuracy against bytes: .png, .svg or .pdf."""
    save_metrics: bool = False
    """Also put the result into the metrics.json of the capsule, which must be one and a folder."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    seed: int = 0
    """Seed of PyTorch. Answers are greedy and do not depend on it; which pages are drawn is --data.seed."""

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio, "--ratio")
            if self.capsule:
                raise InputError("--ratio is for runs without a capsule: beside one, pruning is given as many bytes as the capsule stores.")
        if self.max_new_tokens < 2:
            raise InputError(f"--max_new_tokens {self.max_new_tokens}: the first token is read off the prefill, so at least 2 are needed.")
        for name, count in (("batch", self.batch), ("threads", self.threads)):
            if count is not None and count < 1:
                raise InputError(f"--{name} {count}: at least 1 is needed.")
        if self.plot is not None and Path(self.plot).suffix not in plot.SUFFIXES:
            raise InputError(f"--plot {self.plot}: a picture's name ends in {', '.join(plot.SUFFIXES)}.")
        if self.save_metrics and (len(self.capsule) != 1 or not Path(self.capsule[0]).is_dir()):
            raise InputError("--save_metrics needs exactly one --capsule, and that a folder.")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for input that cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        values = parser.parse_args(_normal(words))
        values.pop("config", None)
        config = EvalConfig(**vars(parser.instantiate(values)))
        found = run(config, Console(stderr=True), _command(words))
        # A file has no edge to wrap at.
        console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
        console.print(*tables(found["rows"], _title(found)), sep="\n")
        _write(found, config)
    except (ArgumentError, ValueError) as error:
        if not _on_purpose(error):
            raise
        return complain(PROG, error)
    return 0


def build_parser() -> ArgumentParser:
    """Every field of EvalConfig as an option, explained by its docstring."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [--capsule ID]... [--model ID] [--json FILE] [--plot FILE] [options]",
        description="Compare capsules, pruning at equal bytes and int4 with the full cache, on the same questions, in one run.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_class_arguments(EvalConfig, None)
    return parser


def run(config: EvalConfig, console: Console, command: str = PROG) -> dict[str, Any]:
    """Measure everything and return the object that docs/eval-json.md describes.

    Args:
        config: see there.
        console: where progress is shown.
        command: the command line that the object names.

    Raises:
        InputError, CapsuleError, DataError, GeometryError, ModelError: for input that cannot be used; what is quick to check comes first.
    """
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    _require_device(config.device)
    _require_writable([path for path in (config.json, config.plot) if path is not None])
    capsules = open_capsules(config.capsule)
    names = chosen(config.methods, capsules)
    if config.ratio is None and not capsules and any(name in RIVALS for name in names):
        raise InputError("give a --capsule whose bytes pruning is to match, or a --ratio; or name --methods that need neither.")
    with console.status("loading the model and the questions"):
        model, processor = load_vlm(config.model, config.revision, config.dtype, config.device)
        for _, capsule in capsules.values():
            capsule.require_geometry(KVGeometry.from_config(model.config))
            capsule.to(model.device)
        questions = source.load(config.data)
    if len(questions) == 0:
        raise DataError(f"{config.data.source} (split {config.data.split!r}) holds no questions.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        first = next(iter(capsules), None)
        ratios: tuple[float, ...] = ()
        if any(name in RIVALS for name in names):
            ratios = _ratios(config, model, processor, questions, None if first is None else capsules[first][1], progress)
        taking_part = entries(names, capsules, ratios, first)
        tallies = evaluate(model, processor, questions, taking_part, config.batch, config.max_new_tokens, progress)
        timings = time_entries(model, processor, questions, taking_part, config.batch, progress) if config.timing else {}
    found = rows(taking_part, tallies, timings)
    _warn_unequal(found, first, console)
    return {
        "model": shown_path(config.model),
        "data": {**asdict(config.data), "source": shown_path(config.data.source)},
        "versions": versions(),
        "seed": config.seed,
        "machine": machine(),
        "rows": found,
        "baseline": _baseline(model),
        "command": command,
        "revision": config.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": config.batch,
        "max_new_tokens": config.max_new_tokens,
        "answer_tokens": answer_tokens(tallies[FULL]),
    }


def _ratios(
    config: EvalConfig,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: datasets.Dataset,
    capsule: Capsule | None,
    progress: Progress,
) -> tuple[float, ...]:
    """The retention ratios of pruning, layer by layer."""
    geometry = KVGeometry.from_config(model.config)
    if capsule is None:
        assert config.ratio is not None
        return (config.ratio,) * geometry.layers
    surveyed = survey(model, processor, questions, capsule, config.batch, progress)
    return match_ratios(surveyed.visual, surveyed.layouts, geometry, full_attention_layers(model.config), model.dtype)


def _warn_unequal(found: list[dict[str, Any]], capsule: str | None, console: Console) -> None:
    """Say so where whole tokens did not allow equal bytes."""
    by_name = {row["method"]: row["visual_kv_bytes"] for row in found}
    if capsule is None or capsule not in by_name:
        return
    for name in RIVALS:
        if name in by_name and abs(by_name[name] / by_name[capsule] - 1) > TOLERANCE:
            console.print(f"{name} stores {by_name[name] / by_name[capsule]:.1%} of the capsule's visual bytes: it keeps whole tokens.")


def _baseline(model: PreTrainedModel) -> str:
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return f"transformers {transformers.__version__} DynamicCache read by the model's own {attention} attention, through generate"


def _require_device(device: str | None) -> None:
    if device in (None, "auto"):
        return
    try:
        torch.empty(0, device=device)
    # A build of torch without CUDA answers with an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _require_writable(paths: list[str]) -> None:
    """Make the folders of the results now: a result that has nowhere to go costs the whole run."""
    for path in map(Path, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"{path} cannot be written: it is a folder, or lies in one that is read-only.")


def _normal(words: list[str]) -> list[str]:
    """The command line as jsonargparse takes it: `--save-metrics` as `--save_metrics`, a repeated `--capsule X` as `--capsule+ X`."""
    normal = []
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            name += "+" if name in _LISTS else ""
        normal.append(name + equals + value)
    return normal


def _command(words: list[str]) -> str:
    """The command line, without the places of absolute paths."""
    shown = []
    for word in words:
        name, equals, value = word.partition("=")
        shown.append(f"{name}={shown_path(value)}" if equals and name.startswith("--") else shown_path(word))
    return shlex.join([*PROG.split(), *shown])


def _write(found: dict[str, Any], config: EvalConfig) -> None:
    """The files that were asked for.

    Raises:
        InputError: if one cannot be written.
    """
    try:
        if config.json is not None:
            write_json(Path(config.json), found)
        if config.plot is not None:
            plot.draw(found["rows"], Path(config.plot), _title(found))
        if config.save_metrics:
            path = Path(config.capsule[0]) / METRICS_FILE
            metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_json(path, {**metrics, "eval": found})
    except OSError as error:
        raise InputError(f"a result cannot be written: {error}") from error
    except json.JSONDecodeError as error:
        raise CapsuleError(f"{config.capsule[0]}: its {METRICS_FILE} is damaged, the result was not put into it ({error}).") from error


def _title(found: dict[str, Any]) -> str:
    return f"{found['model']} on {found['data']['source']}, {found['rows'][0]['n']} questions"


def _on_purpose(error: Exception) -> bool:
    """Whether the project itself refused the input. A ValueError of a library below is a defect, whose traceback is needed."""
    if isinstance(error, ArgumentError):
        return True
    *_, (innermost, _) = walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__", "")).startswith("kvcapsule")
