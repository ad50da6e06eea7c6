"""Options of `kvcapsule analyze`."""

from dataclasses import dataclass, field

from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import InputError

LEAST_QUESTIONS = 8
"""Fewer questions say nothing on how images differ."""


@dataclass(frozen=True)
class AnalyzeConfig:
    """Model, data and outputs of a study."""

    model: str = "pages-vlm"
    """The frozen VLM: a shipped name, a folder or an id on the Hub."""
    revision: str | None = None
    """Revision of the model on the Hub."""
    dtype: str = "auto"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Device of the model, such as cpu or cuda:1; by default CUDA if available."""
    tile: int = 0
    """Visual tokens per tile; 0: the full image, for images of one size."""
    canonical_frame: bool = True
    """Study keys in the canonical frame, as codecs store them. False for models whose rotation has no frame."""
    questions: int = 64
    """Number of questions (fewer if --data.size or the source has fewer)."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Source of questions and answers."""
    batch: int = 8
    """Questions per batch."""
    json: str | None = None
    """File for the result as JSON (docs/analyze.md says what is in it)."""
    plots: str | None = None
    """Folder for four pictures: similarity.png, spectra.png, drift.png, distortion.png."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    seed: int = 0
    """Seed of PyTorch. The study itself is deterministic; --data.seed selects the questions."""

    def __post_init__(self) -> None:
        if self.tile < 0:
            raise InputError(f"--tile {self.tile}: give a number of visual tokens, or 0 for the whole image.")
        if self.questions < LEAST_QUESTIONS:
            raise InputError(f"--questions {self.questions}: a study needs at least {LEAST_QUESTIONS}.")
        for name, count in (("batch", self.batch), ("threads", self.threads)):
            if count is not None and count < 1:
                raise InputError(f"--{name} {count}: at least 1 is needed.")
