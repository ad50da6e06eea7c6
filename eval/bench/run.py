"""One run of `kvcapsule bench`: from its options to the object that docs/bench.md describes."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from kvcapsule.cli import session
from kvcapsule.cli.progress import Stages
from kvcapsule.cli.results import require_writable
from kvcapsule.environment import machine, versions
from kvcapsule.errors import InputError
from kvcapsule.kernels import backend_for

from . import bench_page, ceilings, decode_step, encode, end_to_end, models, operator, serving
from .bench_config import BenchConfig
from .contenders import Measured
from .models import Subject
from .place import cell_of, device_of, precision_of
from .shapes import SHAPES, distinct

_MEMORY = Path("/proc/meminfo")
_FREE = 0.8
"""Default share of the free memory that a comparison may take."""


def run(config: BenchConfig, console: Console, command: str) -> dict[str, Any]:
    """Measure everything and return the object that docs/bench.md describes.

    Raises:
        InputError, ModelError: for input that cannot be used; what is quick to check comes first.
    """
    if device_of(config).type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {config.device}: there is no CUDA device here, or this build of PyTorch has no CUDA. Use"
            " --device cpu."
        )
    session.begin(console, threads=config.threads, seed=config.seed, device=config.device)
    require_writable([config.json, config.plot, config.report])
    if config.report is not None:
        bench_page.require_places(Path(config.report), config.device, config.level)
    result: dict[str, list[dict[str, Any]]] = {"rows": [], "skipped": []}
    with Stages(console) as progress:
        with_ceilings = progress.add_task("ceilings", total=1)
        ceiling = ceilings.measure(device_of(config), precision_of(config))
        progress.advance(with_ceilings)
        for level in config.level:
            rows, skipped = _LEVELS[level](config, ceiling["read_gb_s"], progress)
            result["rows"] += rows
            result["skipped"] += skipped
    return {
        "ceilings": ceiling,
        "rows": result["rows"],
        "skipped": result["skipped"],
        "versions": versions(),
        "seed": config.seed,
        "machine": machine(),
        "device": config.device,
        "dtype": str(precision_of(config)).removeprefix("torch."),
        "kernels": backend_for(device_of(config).type),
        "quick": config.quick,
        "command": command,
    }


def memory_limit(config: BenchConfig) -> int:
    """Bytes that one comparison may take."""
    if config.memory_gib is not None:
        return int(config.memory_gib * 2**30)
    if device_of(config).type == "cuda":
        return int(_FREE * torch.cuda.mem_get_info(device_of(config))[0])
    return int(_FREE * available_memory())


def available_memory() -> int:
    """Bytes of the host's memory that are available without swapping, as Linux counts them; on other systems half of
    all memory."""
    if _MEMORY.is_file():
        for line in _MEMORY.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 2**10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _operator(config: BenchConfig, read_gb_s: float, progress: Progress) -> Measured:
    grid = list(operator.cells(config.geometry, config.visual_tokens, config.batch, partial(cell_of, config)))
    limits = operator.Limits(memory_limit(config), config.rounds, config.seconds)
    rows, skipped = [], operator.equal_shapes(config.geometry)
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
        rows += encode.measure(
            cell_of(config, SHAPES[name], config.encode_tokens, 1), names, config.rounds, config.seconds
        )
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
    """Measure every model at every batch size; the models are built one after the other."""
    names = config.model or models.default(device_of(config))
    task = progress.add_task(level, total=len(names) * len(sizes))
    result: Measured = [], []
    for name in names:
        progress.update(task, description=f"{level}: {name}")
        subject = models.build(name, device_of(config), precision_of(config), config.text, config.tile, config.seed)
        for size in sizes:
            rows, skipped = measure(subject, size)
            result[0].extend(rows)
            result[1].extend(skipped)
            progress.advance(task)
    return result


_LEVELS: dict[str, Callable[[BenchConfig, float, Progress], Measured]] = {
    "operator": _operator,
    "encode": _encode,
    "step": _step,
    "end-to-end": _end_to_end,
    "serving": _serving,
}
