"""The options of `kvcapsule bench`."""

from dataclasses import dataclass, field
from typing import Any

from kvcapsule.errors import ConfigError
from kvcapsule.vlm.precisions import PRECISIONS

from ..report.picture_name import require_picture_name
from .method_names import METHODS
from .shapes import PAGES, SHAPES, known_models

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
    """What is measured, on which models, and where the result is written."""

    level: list[str] = field(default_factory=lambda: list(LEVELS))
    """Levels to measure: operator, encode, step, end-to-end or serving; repeat it or use commas. Default: all."""
    geometry: list[str] = field(default_factory=lambda: list(SHAPES))
    """Models whose layer shapes are timed at operator and encode level; repeat it or use commas. Default: all."""
    visual_tokens: list[int] = field(default_factory=lambda: [576, 2880, 4096, 16384])
    """Visual tokens of a sequence at operator level; repeat it or use commas."""
    batch: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    """Sequences of a batch at operator level; repeat it or use commas."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Methods at operator and encode level; repeat it or use commas. Default: all."""
    text: int = 128
    """Text tokens of a prompt."""
    tile: int = 64
    """Visual tokens of a capsule's tile."""
    rounds: int = 15
    """Readings of each time; their median is reported."""
    seconds: float = 5.0
    """Seconds of readings after which a method gets no more; each gets at least three readings."""
    steps: int = 32
    """Tokens that are written at step level and above."""
    images: list[int] = field(default_factory=lambda: [8])
    """Sequences of a batch, each with its own images, at step and end-to-end level; repeat it or use commas."""
    model: list[str] = field(default_factory=list)
    """Models at step level and above: pages-vlm, kv-bound, or a geometry with random weights; repeat it or use commas.
    Default: pages-vlm and kv-bound on the CPU, all geometries on CUDA."""
    compiled: bool = False
    """Also time StaticCache with a compiled forward, which takes minutes."""
    memory_mib: float = 64.0
    """Memory for caches at serving level, in MiB."""
    memory_gib: float | None = None
    """Memory for one comparison, in GiB; what needs more is left out and listed. Default: four fifths of the free
    memory."""
    encode_tokens: int = 2048
    """Visual tokens of the prompt at encode level."""
    quick: bool = False
    """Run a small grid in under a minute, to see that everything works; its times say little."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "auto"
    """Precision: auto (float32 on the CPU, bfloat16 on CUDA), float32, float16 or bfloat16."""
    json: str | None = None
    """File for the result as JSON (docs/bench.md describes the keys); - prints it in place of the tables."""
    wide: bool = False
    """Show all columns of the tables."""
    plot: str | None = None
    """File for a picture of the serving level: .png, .svg or .pdf."""
    report: str | None = None
    """Markdown file in which the tables are updated."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    seed: int = 0
    """Random seed of data and weights."""

    def __post_init__(self) -> None:
        for name, values, choices in (
            ("level", self.level, LEVELS),
            ("geometry", self.geometry, tuple(SHAPES)),
            ("methods", self.methods, METHODS),
            ("model", self.model or [PAGES], tuple(known_models())),
        ):
            if not values:
                raise ConfigError(f"--{name}: name at least one of {', '.join(choices)}.")
            if wrong := [x for x in values if x not in choices]:
                raise ConfigError(f"--{name} {wrong[0]}: there is {', '.join(choices)}.")
        for name, counts in (("visual_tokens", self.visual_tokens), ("batch", self.batch), ("images", self.images)):
            if not counts or min(counts) < 1:
                raise ConfigError(f"--{name} {counts}: at least one number, each at least 1, is needed.")
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
                raise ConfigError(f"--{name} {value}: more than 0 is needed.")
        if self.steps < _LEAST_STEPS:
            raise ConfigError(f"--steps {self.steps}: at least {_LEAST_STEPS} are needed, of which two warm up.")
        if self.dtype not in ("auto", *PRECISIONS):
            raise ConfigError(f"--dtype {self.dtype}: choose auto, {', '.join(PRECISIONS)}.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device}: only cpu and cuda are timed.")
        require_picture_name(self.plot)
        if self.plot is not None and "serving" not in self.level:
            raise ConfigError("--plot draws what --level serving measures: ask for that level too.")
