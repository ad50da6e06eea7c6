"""The options of `kvcapsule analyze`."""

from dataclasses import dataclass, field

from kvcapsule.data.source_config import SourceConfig
from kvcapsule.errors import ConfigError

LEAST_QUESTIONS = 8
"""Fewer questions do not show how images differ."""


@dataclass(frozen=True)
class AnalyzeConfig:
    """What is studied, on which questions, and where the result is written."""

    model: str = "pages-vlm"
    """The frozen VLM: a shipped name, a folder or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: str = "auto"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Device of the model, such as cpu or cuda:1. Default: CUDA if present."""
    tile: int = 0
    """Visual tokens of a tile. 0: the whole image, which needs images of one size."""
    canonical_frame: bool = True
    """Study keys in the frame of their tile, as codecs store them. false: for models whose rotation has no frame."""
    questions: int = 64
    """Questions to harvest; fewer if --data.size or the source has fewer."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """The questions and answers."""
    batch: int = 8
    """Questions of one forward pass."""
    json: str | None = None
    """File for the result as JSON (docs/analyze.md describes the keys); - prints it in place of the tables."""
    wide: bool = False
    """Show all columns of the tables."""
    plots: str | None = None
    """Folder for four pictures: similarity.png, spectra.png, drift.png, distortion.png."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    seed: int = 0
    """Random seed of PyTorch. The study draws nothing at random; --data.seed chooses the questions."""

    def __post_init__(self) -> None:
        if self.tile < 0:
            raise ConfigError(f"--tile {self.tile}: give a number of visual tokens, or 0 for the whole image.")
        if self.questions < LEAST_QUESTIONS:
            raise ConfigError(f"--questions {self.questions}: a study needs at least {LEAST_QUESTIONS}.")
        for name, count in (("batch", self.batch), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ConfigError(f"--{name} {count}: at least 1 is needed.")
