"""What `kvcapsule analyze` can be told."""

from dataclasses import dataclass, field

from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import InputError

LEAST_QUESTIONS = 8
"""Fewer questions say nothing on how images differ."""


@dataclass(frozen=True)
class AnalyzeConfig:
    """What is studied, on what, and where the result goes."""

    model: str = "pages-vlm"
    """The frozen VLM: a shipped name, a folder or an id on the Hub."""
    revision: str | None = None
    """Its revision on the Hub."""
    dtype: str = "auto"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Where it runs, such as cpu or cuda:1; by default CUDA where there is one."""
    tile: int = 0
    """Visual tokens of a tile; 0 takes the whole image, which asks for images of one size."""
    canonical_frame: bool = True
    """Study keys as codecs store them, as if their tile began at position 0. False where no frame undoes what the model
    does."""
    questions: int = 64
    """Questions that are harvested (fewer where --data.size or the source has fewer)."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Where questions and answers come from."""
    batch: int = 8
    """Questions that the model is given at once."""
    json: str | None = None
    """File for the result as JSON (docs/analyze.md says what is in it)."""
    plots: str | None = None
    """Folder for four pictures: similarity.png, spectra.png, drift.png, distortion.png."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    seed: int = 0
    """Seed of PyTorch. The study draws nothing at random; which questions are asked is --data.seed."""

    def __post_init__(self) -> None:
        if self.tile < 0:
            raise InputError(f"--tile {self.tile}: give a number of visual tokens, or 0 for the whole image.")
        if self.questions < LEAST_QUESTIONS:
            raise InputError(f"--questions {self.questions}: a study needs at least {LEAST_QUESTIONS}.")
        for name, count in (("batch", self.batch), ("threads", self.threads)):
            if count is not None and count < 1:
                raise InputError(f"--{name} {count}: at least 1 is needed.")
