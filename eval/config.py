"""What `kvcapsule eval` can be told."""

from dataclasses import dataclass, field
from pathlib import Path

from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import InputError

from .report import scatter


@dataclass(frozen=True)
class EvalConfig:
    """What is compared, on what, and where the result goes."""

    model: str = "pages-vlm"
    """The VLM: a shipped name, a folder or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: str = "auto"
    """Precision of the model: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Where it runs, such as cpu or cuda:1; by default CUDA where there is one."""
    capsule: list[str] = field(default_factory=list)
    """A capsule: a folder, a shipped name or an id on the Hub. May be repeated; policies are given as many bytes as the
    first stores."""
    budget: float | None = None
    """Without a capsule: share that policies keep, in (0, 1], of what each method's own dial is about: visual tokens,
    or all. With one it is chosen so that bytes are equal."""
    ratio: float | None = None
    """The same as --budget."""
    methods: list[str] = field(default_factory=list)
    """Compare only these rows with the full cache, e.g. snapkv,int3: policies of `kvcapsule methods`, int8 to int2,
    kivi4, kivi2, or those of a capsule or suite. With commas or repeated. By default the capsules, pruning and int4, or
    all rows of the suite."""
    suite: str | None = None
    """A suite, in place of --capsule and --budget: the name of a shipped one or a YAML file, with methods and options
    that others here override."""
    suite_capsules: str | None = None
    """Folder of the suite's capsules; by default runs/ and the suite's name."""
    train: bool = True
    """Whether capsules of the suite that are not there are trained. If not, they are refused, with the commands that
    train them."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(split="test", size=200))
    """Where the questions come from."""
    resize: bool = True
    """Whether images are brought to the size that the model's processor sets; if not, they keep the sizes that they
    have."""
    batch: int = 16
    """Questions that are answered together."""
    max_new_tokens: int = 64
    """Most tokens of an answer, the end token included."""
    share_prefill: bool = True
    """Whether a batch's prefill, which is the same for all methods, is run once for all. It takes memory for the
    queries, keys and values of all layers; false runs it for each method."""
    timing: bool = True
    """Whether prefill and decode are timed."""
    json: str | None = None
    """File for the result as JSON (docs/eval-json.md says what is in it)."""
    plot: str | None = None
    """File for a picture, accuracy against bytes: .png, .svg or .pdf."""
    report: str | None = None
    """Markdown file whose table of the suite is brought up to date."""
    save_metrics: bool = False
    """Also put the result into metrics.json and the model card of the capsule, which must be one and a folder."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    seed: int = 0
    """Seed of PyTorch. Answers are greedy and do not depend on it; which pages are drawn is --data.seed."""

    def __post_init__(self) -> None:
        for name, share in (("budget", self.budget), ("ratio", self.ratio)):
            if share is not None and not 0 < share <= 1:
                raise InputError(f"--{name} {share} is outside (0, 1]: it is the share that is kept, 1 keeps all.")
            if share is not None and self.capsule:
                raise InputError(
                    f"--{name} is for runs without a capsule: beside one, policies are given as many bytes as the"
                    " capsule stores."
                )
        if self.budget is not None and self.ratio is not None:
            raise InputError("--budget and --ratio are the same: leave one out.")
        if self.suite is not None and (self.capsule or self.budget is not None or self.ratio is not None):
            raise InputError(
                "--suite says which methods are compared: leave out --capsule and --budget (or --ratio), or the suite."
            )
        if self.suite is None and self.report is not None:
            raise InputError("--report takes the table of a suite: give a --suite too.")
        if self.max_new_tokens < 2:
            raise InputError(
                f"--max_new_tokens {self.max_new_tokens}: the first token is read off the prefill, so at least 2 are"
                " needed."
            )
        for name, count in (("batch", self.batch), ("threads", self.threads)):
            if count is not None and count < 1:
                raise InputError(f"--{name} {count}: at least 1 is needed.")
        if self.plot is not None and Path(self.plot).suffix not in scatter.SUFFIXES:
            raise InputError(f"--plot {self.plot}: a picture's name ends in {', '.join(scatter.SUFFIXES)}.")
        if self.save_metrics and (len(self.capsule) != 1 or not Path(self.capsule[0]).is_dir()):
            raise InputError("--save_metrics needs exactly one --capsule, and that a folder.")
