"""The options of `kvcapsule report`."""

from dataclasses import dataclass, field

from kvcapsule.data.source_config import SourceConfig
from kvcapsule.errors import ConfigError

from ..protocol_names import ASK_LATER, PROTOCOL_NAMES
from ..scores.metric_names import AUTO, METRICS

_MOST_EXAMPLES = 64
"""Pictures lie within the page."""


@dataclass(frozen=True)
class PageConfig:
    """What the page shows, and where it is written."""

    output: str | None = None
    """File of the page. Default: report.html in the capsule's folder, where `kvcapsule push` takes it from, and
    NAME-report.html here for a shipped or downloaded capsule."""
    evaluation: str | None = None
    """JSON of a `kvcapsule eval` with this capsule, for the tables. Default: the evaluation that was saved with the
    capsule (`kvcapsule eval --save-metrics true`)."""
    examples: int = 6
    """Questions that are answered side by side."""
    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub. Default: the model that the capsule was trained with."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: str = "auto"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Device of the model, such as cpu or cuda:1. Default: CUDA if present."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(split="test", size=200))
    """Where the examples come from. The defaults of source and columns are those that the capsule was trained with, and
    another split."""
    protocol: str = ASK_LATER
    """When the question of an example is asked: ask-later, once the image is compressed, or ask-first, with it."""
    metric: str = AUTO
    """How the answers of the examples are judged, as in `kvcapsule eval`."""
    max_new_tokens: int = 64
    """Most tokens of an answer, the end token included."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    seed: int = 0
    """Random seed of PyTorch; answers are greedy and do not depend on it."""

    def __post_init__(self) -> None:
        if not 1 <= self.examples <= _MOST_EXAMPLES:
            raise ConfigError(f"--examples {self.examples}: the page shows 1 to {_MOST_EXAMPLES} examples.")
        if self.max_new_tokens < 2:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: at least 2 are needed.")
        if self.protocol not in PROTOCOL_NAMES:
            raise ConfigError(f"--protocol {self.protocol} is unknown: name one of {', '.join(PROTOCOL_NAMES)}.")
        if self.metric not in (AUTO, *METRICS):
            raise ConfigError(f"--metric {self.metric} is unknown: name one of {', '.join((AUTO, *METRICS))}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads}: at least 1 is needed.")
