"""One run: from what was asked for to the object that docs/bench.md describes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvcapsule.cli.results import require_writable
from kvcapsule.environment import machine, versions
from kvcapsule.errors import InputError
from kvcapsule.kernels import backend_for
from kvcapsule.vlm.loading import require_device

from . import ceilings, decode_step, encode, end_to_end, markdown, models, operator, serving
from .config import BenchConfig
from .contenders import Measured
from .models import Subject
from .shapes import SHAPES, distinct

_MEMORY = Path("/proc/meminfo")
_FREE = 0.8
"""Share of the free memory that a comparison may take unless asked otherwise."""


def run(config: BenchConfig, console: Console, command: str) -> dict[str, Any]:
    """Measure everything and return the object that docs/bench.md describes.

    Raises:
        InputError, ModelError: for input that cannot be used; what is quick to check comes first.
    """
    if config.place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {config.device}: there is no CUDA device here, or this build of PyTorch has no CUDA. Use"
            " --device cpu."
        )
    require_device(config.device)
    require_writable([config.json, config.plot, config.report])
    if config.report is not None:
        markdown.require_places(Path(config.report), config.device, config.level)
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "skipped": []}
    with Progress(*columns, console=console) as progress:
        with_ceilings = progress.add_task("ceilings", total=1)
        ceiling = ceilings.measure(config.place, config.precision)
        progress.advance(with_ceilings)
        for level in config.level:
            rows, skipped = _LEVELS[level](config, ceiling["read_gb_s"], progress)
            found["rows"] += rows
            found["skipped"] += skipped
    return {
        "ceilings": ceiling,
        "rows": found["rows"],
        "skipped": found["skipped"],
        "versions": versions(),
        "seed": config.seed,
        "machine": machine(),
        "device": config.device,
        "dtype": str(config.precision).removeprefix("torch."),
        "kernels": backend_for(config.place.type),
        "quick": config.quick,
        "command": command,
    }


def memory_limit(config: BenchConfig) -> int:
    """Bytes that one comparison may take."""
    if config.memory_gib is not None:
        return int(config.memory_gib * 2**30)
    if config.place.type == "cuda":
        return int(_FREE * torch.cuda.mem_get_info(config.place)[0])
    return int(_FREE * available_memory())


def available_memory() -> int:
    """Bytes that the host can give without swapping, as Linux counts them; half of all memory where the system does not
    tell."""
    if _MEMORY.is_file():
        for line in _MEMORY.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 2**10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _operator(config: BenchConfig, read_gb_s: float, progress: Progress) -> Measured:
    grid = list(operator.cells(config.geometry, config.visual_tokens, config.batch, config.cell))
    limits = operator.Limits(memory_limit(config), config.rounds, config.seconds)
    rows, skipped = [], operator.alike(config.geometry)
    task = progress.add_task("operator", total=len(grid))
    for cell in grid:
        progress.update(task, description=f"operator: {cell.shape.name}, {cell.batch} x {cell.visual} visual tokens")
        more, left_out = operator.measure(cell, config.methods, limits, read_gb_s)
        rows += more
        skipped += left_out
        progress.advance(task)
    return rows, skipped


def _encode(config: BenchConfig, read_gb_s: float, progress: Progress) -> Measured:
    names = [name for name in config.methods if name != "full-segments"]
    rows, shapes = [], distinct(config.geometry)
    task = progress.add_task("encode", total=len(shapes))
    for name in shapes:
        progress.update(task, description=f"encode: {name}, {config.encode_tokens} visual tokens")
        rows += encode.measure(config.cell(SHAPES[name], config.encode_tokens, 1), names, config.rounds, config.seconds)
        progress.advance(task)
    return rows, []


def _step(config: BenchConfig, read_gb_s: float, progress: Progress) -> Measured:
    def measure(subject: Subject, size: int) -> Measured:
        return decode_step.measure(subject, size, config.steps, config.compiled, read_gb_s)

    return _of_models(config, progress, "step", config.images, measure)


def _end_to_end(config: BenchConfig, read_gb_s: float, progress: Progress) -> Measured:
    def measure(subject: Subject, size: int) -> Measured:
        return end_to_end.measure(subject, size, config.steps, config.rounds, config.seconds, config.compiled)

    return _of_models(config, progress, "end-to-end", config.images, measure)


def _serving(config: BenchConfig, read_gb_s: float, progress: Progress) -> Measured:
    def measure(subject: Subject, size: int) -> Measured:
        return serving.measure(subject, config.memory_mib, config.steps)

    return _of_models(config, progress, "serving", [1], measure)


def _of_models(
    config: BenchConfig,
    progress: Progress,
    level: str,
    sizes: Sequence[int],
    measure: Callable[[Subject, int], Measured],
) -> Measured:
    """What `measure` gives of each model, which are built one after the other, at each size of a batch."""
    names = config.model or models.default(config.place)
    task = progress.add_task(level, total=len(names) * len(sizes))
    found: Measured = [], []
    for name in names:
        progress.update(task, description=f"{level}: {name}")
        subject = models.build(name, config.place, config.precision, config.text, config.tile, config.seed)
        for size in sizes:
            rows, skipped = measure(subject, size)
            found[0].extend(rows)
            found[1].extend(skipped)
            progress.advance(task)
    return found


_LEVELS: dict[str, Callable[[BenchConfig, float, Progress], Measured]] = {
    "operator": _operator,
    "encode": _encode,
    "step": _step,
    "end-to-end": _end_to_end,
    "serving": _serving,
}
