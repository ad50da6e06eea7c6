"""What a training run of a 7B's KV geometry takes: CPU seconds, memory and batches through the VLM of each stage, and
the capsule's file and errors.

    python tests/support/training_cost.py --shape gqa --questions 200 --json eval/results/training-cost.json

The model is a LLaVA with random weights: few channels beside the attention, so that what is counted is mostly the work
on keys and values. Memory is the process's resident set above what it holds with the model and the questions loaded.
Linux only (/proc).
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from kvcapsule.checkpoints import shipped
from kvcapsule.cli import progress
from kvcapsule.environment import machine, versions
from kvcapsule.training.main import main as train

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PATCH = 8
"""Pixels of a visual token's side."""


class Shape(NamedTuple):
    """KV geometry of a model and the size of its images."""

    layers: int
    query_heads: int
    kv_heads: int
    side: int
    """Visual tokens along each side of an image."""
    tile: int
    head_dim: int = 128
    hidden: int = 256
    intermediate: int = 512


SHAPES = {
    "small": Shape(4, 8, 2, 14, 49, 64),
    "gqa": Shape(32, 32, 8, 14, 49),
    "vicuna": Shape(32, 32, 32, 32, 64),
}
"""gqa: 97 million parameters with the heads of an 8B of grouped queries. vicuna: those of LLaVA-1.5-7B, with images of
1,024 tokens."""


class Stage(NamedTuple):
    """A part of the run, in order."""

    title: str
    cpu_s: float
    wall_s: float
    peak_mib: float
    """Above what the process held before the run."""
    batches: int
    """Forwards of the whole VLM."""


class Meter:
    """Notes stages as their progress bars begin and end."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.base = 0.0
        self._batches = 0
        self._title = "loading"
        self._begin()

    def loaded(self) -> None:
        """The model and the questions are in memory."""
        self.mark("before the first batch")
        self.base = self.base or _resident("VmRSS")

    def forward(self) -> None:
        if not self.base:
            self.loaded()
        self._batches += 1

    def mark(self, title: str) -> None:
        """One stage ends and another begins."""
        peak = _resident("VmHWM")
        stage = Stage(
            self._title, time.process_time() - self._cpu, time.perf_counter() - self._wall, peak, self._batches
        )
        self.stages.append(stage)
        self._title = title
        self._begin()

    def _begin(self) -> None:
        _CLEAR.write_text("5")
        self._cpu, self._wall, self._batches = time.process_time(), time.perf_counter(), 0


def build(shape: Shape, folder: Path, seed: int = 0) -> int:
    """Write a random LLaVA with the processor of pages-vlm; returns its number of parameters."""
    source = shipped("pages-vlm")
    assert source is not None
    config = AutoConfig.from_pretrained(source)
    text, pixels = config.text_config, _PATCH * shape.side
    text.num_hidden_layers, text.num_attention_heads = shape.layers, shape.query_heads
    text.num_key_value_heads, text.head_dim = shape.kv_heads, shape.head_dim
    text.hidden_size, text.intermediate_size = shape.hidden, shape.intermediate
    config.image_seq_length = shape.side**2
    processor = AutoProcessor.from_pretrained(source)
    for name in ("size", "crop_size"):
        setattr(processor.image_processor, name, {"height": pixels, "width": pixels})
    processor.save_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def measure(words: list[str], output: Path) -> dict[str, Any]:
    """Run `kvcapsule train` in this process and return what it took."""
    meter = Meter()
    bar, close = progress.Bar.__init__, progress.Bar.close
    forward = PreTrainedModel.__call__

    @wraps(bar)
    def begun(self: progress.Bar, console: Any, title: str, *rest: Any, **options: Any) -> None:
        meter.mark(title)
        bar(self, console, title, *rest, **options)

    @wraps(close)
    def closed(self: progress.Bar, *rest: Any) -> None:
        close(self, *rest)
        meter.mark(f"after {self.title}")

    @wraps(forward)
    def counted(self: Any, *rest: Any, **options: Any) -> Any:
        if "pixel_values" in options and type(self).__name__.endswith("ConditionalGeneration"):
            meter.forward()
        return forward(self, *rest, **options)

    patched: list[tuple[Any, str, Callable[..., Any]]] = [
        (progress.Bar, "__init__", begun),
        (progress.Bar, "close", closed),
        (PreTrainedModel, "__call__", counted),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    for owner, name, function in patched:
        setattr(owner, name, function)
    try:
        if code := train([*words, "--output", str(output)]):
            raise SystemExit(code)
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
    meter.mark("")
    metrics = json.loads((output / "metrics.json").read_text())["train"]
    stages = [s._replace(peak_mib=max(0.0, s.peak_mib - meter.base)) for s in meter.stages]
    return {
        "cpu_s": sum(s.cpu_s for s in stages),
        "wall_s": sum(s.wall_s for s in stages),
        "base_mib": meter.base,
        "peak_mib": max(s.peak_mib for s in stages),
        "batches": sum(s.batches for s in stages),
        "file_bytes": (output / "model.safetensors").stat().st_size,
        "errors": {
            k: metrics[k] for k in ("keys_unexplained", "values_unexplained", "output_error", "kl") if k in metrics
        },
        "compression": metrics["compression"],
        "stages": [s._asdict() for s in stages if s.cpu_s > 0.05 or s.batches],
    }


def _resident(name: str) -> float:
    """MiB of VmRSS or VmHWM."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gqa")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("words", nargs="*", help="further options of kvcapsule train, behind --")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        parameters = build(shape, model)
        words = ["--model", str(model), "--compression", "20", "--codec.tile", str(shape.tile), "--batch", "4"]
        words += ["--data.size", str(options.questions), "--threads", str(options.threads), "--device", "cpu"]
        result = measure([*words, *options.words], Path(scratch) / "capsule")
    result |= {
        "shape": options.shape,
        **shape._asdict(),
        "parameters": parameters,
        "questions": options.questions,
        "options": options.words,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": versions(),
        "machine": machine(),
    }
    text = json.dumps(result, indent=1)
    if options.json:
        Path(options.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
