"""The options of `kvcapsule eval`."""

from dataclasses import dataclass, field
from pathlib import Path

from kvcapsule.data.source_config import SourceConfig
from kvcapsule.errors import ConfigError

from .protocol_names import ASK_FIRST, PROTOCOL_NAMES
from .report.picture_name import require_picture_name
from .scores.metric_names import AUTO, METRICS

RENAMED = {"ratio": "--ratio is --budget now: the share of the tokens that policies keep, in (0, 1]."}
"""Options that no longer exist, and the sentence that refuses them."""


@dataclass(frozen=True)
class EvalConfig:
    """What is compared, on which questions, and where the result is written."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub. With --capsule the default is the model that the first
    capsule was trained with."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: str = "auto"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Device of the model, such as cpu or cuda:1. Default: CUDA if present."""
    capsule: list[str] = field(default_factory=list)
    """A capsule: a folder, a shipped name or an id on the Hub. May be repeated. Policies are matched to the bytes of
    the first one."""
    budget: float | None = None
    """Without a capsule: share of the tokens that policies keep, in (0, 1]; of the visual tokens for a policy whose
    setting is retention, of all tokens for one whose setting is budget."""
    methods: list[str] = field(default_factory=list)
    """Rows to compare with the full cache, such as snapkv,int3; repeat it or use commas. Names are the policies of
    `kvcapsule methods`, int8 to int2, kivi4, kivi2, turboquant4 to turboquant2, the capsules' rows and the suite's
    entries. Default: the capsules, two pruning policies and int4, or all entries of the suite."""
    suite: str | None = None
    """A suite of methods and options, in place of --capsule and --budget: a shipped name or a YAML file. Options on the
    command line override those of the suite."""
    suite_capsules: str | None = None
    """Folder of the suite's trained capsules. Default: runs/ and the suite's name."""
    train: bool = True
    """Train the suite's capsules that are missing. false: refuse, and print the commands that train them."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(split="test", size=200))
    """The questions. With --capsule the defaults of source and columns are those that the first capsule was trained
    with, and another split."""
    allow_seen: bool = False
    """Measure even where a capsule was trained on more than one in twenty of the questions."""
    strict: bool = False
    """Refuse a capsule of another model. false: say so in one line and go on."""
    resize: bool = True
    """Resize images to the size that the model's processor sets. false: keep their sizes."""
    batch: int = 16
    """Questions that are answered together."""
    max_new_tokens: int = 64
    """Most tokens of an answer, the end token included."""
    protocol: str = ASK_FIRST
    """When the question is asked. ask-first: with the image; the whole prompt is compressed behind it. ask-later: after
    the prompt up to its last visual token was compressed, once for all questions about the same images; policies that
    rank by the question see none."""
    metric: str = AUTO
    """How answers are judged: exact, relaxed-exact (case, punctuation and articles aside), anls, vqa, relaxed-accuracy
    (charts), cer, wer, multiple-choice or demo (by the tasks of the demo's data). auto: demo for the built-in sources;
    else multiple-choice for questions with options, vqa for those with ten accepted answers, relaxed-exact for
    others."""
    share_prefill: bool = True
    """Run the prefill of a batch once and give it to all methods, which needs memory for the queries, keys and values
    of all layers. false: run it for every method."""
    timing: bool = True
    """Time prefill and decoding."""
    json: str | None = None
    """File for the result as JSON (docs/eval-json.md describes the keys); - prints it in place of the tables."""
    wide: bool = False
    """Show all columns of the tables."""
    plot: str | None = None
    """File for a picture of losses against bytes: .png, .svg or .pdf."""
    report: str | None = None
    """Markdown file in which the table of the suite is updated."""
    save_metrics: bool = False
    """Also write the result to metrics.json and the model card of the capsule; needs exactly one --capsule, a
    folder."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    seed: int = 0
    """Random seed of PyTorch. Answers are greedy and do not depend on it; --data.seed chooses the questions."""

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ConfigError(f"--budget {self.budget} is outside (0, 1]: it is the share that is kept, 1 keeps all.")
        if self.budget is not None and self.capsule:
            raise ConfigError(
                "--budget is for runs without a capsule: beside one, policies are given as many bytes as the capsule"
                " stores."
            )
        if self.suite is not None and (self.capsule or self.budget is not None):
            raise ConfigError(
                "--suite says which methods are compared: leave out --capsule and --budget, or leave out the suite."
            )
        if self.suite is None and self.report is not None:
            raise ConfigError("--report takes the table of a suite: give a --suite too.")
        if self.max_new_tokens < 2:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens}: the first token comes from the prefill, so at least 2 are"
                " needed."
            )
        if self.protocol not in PROTOCOL_NAMES:
            raise ConfigError(f"--protocol {self.protocol} is unknown: name one of {', '.join(PROTOCOL_NAMES)}.")
        if self.metric not in (AUTO, *METRICS):
            raise ConfigError(f"--metric {self.metric} is unknown: name one of {', '.join((AUTO, *METRICS))}.")
        for name, count in (("batch", self.batch), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ConfigError(f"--{name} {count}: at least 1 is needed.")
        require_picture_name(self.plot)
        if self.save_metrics and (len(self.capsule) != 1 or not Path(self.capsule[0]).is_dir()):
            raise ConfigError("--save-metrics needs exactly one --capsule, and that a folder.")
