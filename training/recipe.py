"""Everything that a training run is told."""

from dataclasses import dataclass, field
from pathlib import Path

from kvcapsule.codec.kvcapsule import KVCapsuleConfig, check_ratio, pyramid, weighted
from kvcapsule.data.source import SourceConfig

from .module import OptimConfig


@dataclass(frozen=True)
class CodecRecipe:
    """How a KVCapsule is shaped."""

    key_share: float = 0.5
    """Share of the stored tokens that keys get: 0.5 treats keys and values alike, as the paper does; less gives values more."""
    key_ratio: float | None = None
    """Mean retention ratio of the keys, in place of what --ratio and --codec.key_share give."""
    value_ratio: float | None = None
    """Mean retention ratio of the values, likewise."""
    pyramid: float = 0.0
    """How much more the first layer keeps than the mean, as a fraction of it (and the last layer less): 0 is uniform."""
    layer_weights: list[float] | None = None
    """How much each layer keeps relative to the others, in place of a pyramid; the mean stays what --ratio says."""
    tile: int = 0
    """Visual tokens that one map covers; 0 takes the whole image, as the paper does, which ties the capsule to one image size."""
    key_decoder: str = "linear"
    """"linear" (attention reads the retained keys through it) or "mlp" (the paper's prose; rebuilds all keys at every read)."""
    hidden: int = 256
    """Width of the MLP's inner layer."""
    canonical_frame: bool = True
    """Store keys as if their tile began at position 0."""


@dataclass(frozen=True)
class Recipe:
    """A training run of `kvcapsule train`."""

    model: str = "pages-vlm"
    """The frozen VLM: a folder, a shipped name or an id on the Hub."""
    revision: str | None = None
    """Its revision on the Hub."""
    dtype: str = "auto"
    """Precision of the frozen VLM: auto, float32, float16 or bfloat16."""
    device: str | None = None
    """Where it runs; None takes a GPU where there is one."""
    ratio: float = 0.4
    """Mean retention ratio over keys, values and layers, in (0, 1]: stored tokens / visual tokens. 0.4 stores 2.5 times less."""
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    """Shape of the codecs."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How they learn."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(size=2048))
    """Where questions and answers come from."""
    held_out: int = 64
    """Questions kept apart to measure reconstruction on (the last of the source, never trained on)."""
    batch: int = 16
    """Questions a step."""
    moment_batches: int = 40
    """Batches that the closed-form parts (PCA, first reconstruction) are computed from."""
    workers: int = 0
    """Processes that prepare batches."""
    threads: int | None = None
    """CPU threads; None leaves it to torch."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "runs/capsule"
    """The capsule's folder. Logs and checkpoints go to a folder of the same name with .run at its end."""
    force: bool = False
    """Replace a capsule that is at output."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same output."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "--ratio")
        if not 0 < self.codec.key_share < 1:
            raise ValueError(f"--codec.key_share {self.codec.key_share} is outside (0, 1).")
        for name, count in (("batch", self.batch), ("moment_batches", self.moment_batches), ("held_out", self.held_out)):
            if count < 1:
                raise ValueError(f"--{name} {count}: at least 1 is needed.")

    @property
    def work(self) -> Path:
        """Folder of logs and checkpoints."""
        return Path(self.output + ".run")

    def mean_ratios(self) -> tuple[float, float]:
        """Mean retention ratios of keys and values: what --ratio gives, split by key_share; what one cannot use goes to the other."""
        keys, values = 2 * self.ratio * self.codec.key_share, 2 * self.ratio * (1 - self.codec.key_share)
        keys, values = min(1.0, keys + max(0.0, values - 1.0)), min(1.0, values + max(0.0, keys - 1.0))
        return (
            keys if self.codec.key_ratio is None else self.codec.key_ratio,
            values if self.codec.value_ratio is None else self.codec.value_ratio,
        )

    def _by_layer(self, mean: float, layers: int) -> tuple[float, ...]:
        weights = self.codec.layer_weights
        if weights is None:
            return pyramid(mean, layers, self.codec.pyramid)
        if self.codec.pyramid:
            raise ValueError("--codec.pyramid and --codec.layer_weights both say what layers keep: give one.")
        if len(weights) != layers:
            raise ValueError(f"--codec.layer_weights has {len(weights)} numbers, but the model has {layers} layers: give one for each.")
        return weighted(mean, weights)

    def codec_config(self, layers: int, tile: int) -> KVCapsuleConfig:
        """The sizes of the codecs of a model with so many layers, for tiles of so many tokens."""
        keys, values = self.mean_ratios()
        return KVCapsuleConfig(
            tile=tile,
            canonical_frame=self.codec.canonical_frame,
            key_ratios=self._by_layer(keys, layers),
            value_ratios=self._by_layer(values, layers),
            key_decoder=self.codec.key_decoder,
            hidden=self.codec.hidden,
        )
