"""What `kvcapsule bench` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvcapsule.errors import InputError
from kvcapsule.vlm.loading import DTYPES

from ..report import scatter
from .layer_data import Cell
from .methods import METHODS
from .models import PAGES, known
from .shapes import SHAPES, Shape

LEVELS = ("operator", "encode", "step", "end-to-end", "serving")
_LEAST_STEPS = 3
QUICK: dict[str, Any] = {
    "geometry": ["qwen2.5-vl-7b"],
    "visual_tokens": [576],
    "batch": [1],
    "methods": ["kvcapsule-r0.4", "kept-10%", "transform-20x"],
    "rounds": 3,
    "seconds": 1.0,
    "steps": 3,
    "images": [2],
    "model": [PAGES],
    "memory_mib": 4.0,
    "encode_tokens": 64,
}
"""Defaults of a quick run."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, on what, and where the result goes."""

    level: list[str] = field(default_factory=lambda: list(LEVELS))
    """What is measured, of operator, encode, step, end-to-end and serving; with commas or repeated."""
    geometry: list[str] = field(default_factory=lambda: list(SHAPES))
    """Shapes of models whose layers are timed at operator level; with commas or repeated."""
    visual_tokens: list[int] = field(default_factory=lambda: [576, 2880, 4096, 16384])
    """Visual tokens of a sequence at operator level; with commas or repeated."""
    batch: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    """Sequences of a batch at operator level; with commas or repeated."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Methods at operator level; with commas or repeated."""
    text: int = 128
    """Tokens of text in a prompt."""
    tile: int = 64
    """Visual tokens of a capsule's tile."""
    rounds: int = 15
    """Readings of each time; medians are what is reported."""
    seconds: float = 5.0
    """After so many a contender of one cell takes no more readings, if it has three."""
    steps: int = 32
    """Tokens that are written at step level and above."""
    images: list[int] = field(default_factory=lambda: [8])
    """Sequences of a batch, each with images of its own, at step level and end to end; with commas or repeated."""
    model: list[str] = field(default_factory=list)
    """Models at step level and above: pages-vlm, kv-bound, or a geometry with random weights; by default the first two,
    on CUDA all geometries."""
    compiled: bool = False
    """Whether the StaticCache is also timed with a compiled forward; that takes minutes."""
    memory_mib: float = 64.0
    """What caches may take at serving level, in MiB."""
    memory_gib: float | None = None
    """What one comparison may take, in GiB; cells that need more are left out and said to be. By default four fifths of
    what is free."""
    encode_tokens: int = 2048
    """Tokens of the prompt whose prefill the encoding of one layer is held against."""
    quick: bool = False
    """A small grid, in under a minute: to see that all works, not to learn how fast anything is."""
    device: str = "cpu"
    """cpu, or cuda."""
    dtype: str = "auto"
    """Precision: auto (float32 on the CPU, bfloat16 on CUDA), float32, float16 or bfloat16."""
    json: str | None = None
    """File for the result as JSON (docs/bench.md says what is in it)."""
    plot: str | None = None
    """File for a picture, serving within a memory budget: .png, .svg or .pdf."""
    report: str | None = None
    """Markdown file whose tables are brought up to date."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    seed: int = 0
    """Of random data and weights."""

    def __post_init__(self) -> None:
        for name, given, choices in (
            ("level", self.level, LEVELS),
            ("geometry", self.geometry, tuple(SHAPES)),
            ("methods", self.methods, tuple(METHODS)),
            ("model", self.model or [PAGES], tuple(known())),
        ):
            if not given:
                raise InputError(f"--{name}: name at least one of {', '.join(choices)}.")
            if wrong := [x for x in given if x not in choices]:
                raise InputError(f"--{name} {wrong[0]}: there is {', '.join(choices)}.")
        for name, counts in (("visual_tokens", self.visual_tokens), ("batch", self.batch), ("images", self.images)):
            if not counts or min(counts) < 1:
                raise InputError(f"--{name} {counts}: at least one number, each at least 1, is needed.")
        for name in (
            "text",
            "tile",
            "rounds",
            "steps",
            "threads",
            "seconds",
            "memory_mib",
            "memory_gib",
            "encode_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"--{name} {value}: more than 0 is needed.")
        if self.steps < _LEAST_STEPS:
            raise InputError(f"--steps {self.steps}: at least {_LEAST_STEPS} are needed, of which two warm up.")
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"--dtype {self.dtype}: choose auto, {', '.join(DTYPES)}.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device}: only cpu and cuda are timed.")
        if self.plot is not None and Path(self.plot).suffix not in scatter.SUFFIXES:
            raise InputError(f"--plot {self.plot}: a picture's name ends in {', '.join(scatter.SUFFIXES)}.")
        if self.plot is not None and "serving" not in self.level:
            raise InputError("--plot draws what --level serving measures: ask for that level too.")

    def cell(self, shape: Shape, visual: int, batch: int) -> Cell:
        """A layer of a shape, with so many sequences of so many visual tokens."""
        return Cell(shape, batch, visual, self.text, self.tile, self.precision, self.place, self.seed)

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def precision(self) -> torch.dtype:
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.float32 if self.place.type == "cpu" else torch.bfloat16
