"""Options of the family kvcapsule, and the retention ratios that they stand for."""

from dataclasses import dataclass, field

from kvcapsule.errors import ConfigError
from kvcapsule.methods.ratios import pyramid, weighted

from ..recipe import PyramidOptions, Recipe, require_at_least_zero


@dataclass(frozen=True)
class KVCapsuleShape(PyramidOptions):
    """Shape of the codecs."""

    key_share: float = 0.5
    """Share of the stored tokens that keys get: 0.5 treats keys and values alike, as the paper does; less gives values
    more."""
    key_retention: float | None = None
    """Mean retention of the keys, in place of what --compression and --codec.key_share give."""
    value_retention: float | None = None
    """Mean retention of the values, likewise."""
    layer_weights: list[float] | None = None
    """How much each layer keeps relative to the others, in place of a pyramid; the mean stays what --compression
    says."""
    key_decoder: str = "linear"
    """"linear" (attention reads the retained keys through it) or "mlp" (the paper's prose; rebuilds all keys at every
    read)."""
    hidden: int = 256
    """Width of the MLP's inner layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.key_share < 1:
            raise ConfigError(f"--codec.key_share {self.key_share} is outside (0, 1).")
        if self.pyramid and self.layer_weights is not None:
            raise ConfigError("--codec.pyramid and --codec.layer_weights both say what layers keep: give one.")


@dataclass(frozen=True)
class OptimOptions:
    """Learning of a KVCapsule."""

    soft_steps: int = 120
    """Steps with the soft mask, at a falling temperature."""
    hard_steps: int = 120
    """Steps with the hard mask, on reconstruction and attention output."""
    lr: float = 1e-3
    """Peak learning rate of Adam, for reconstructions."""
    mask_lr: float = 2e-2
    """Learning rate of the mask logits."""
    temperature_start: float = 1.0
    """Temperature of the mask at the first step."""
    temperature_end: float = 0.1
    """Temperature at the last soft step; it decays geometrically."""
    mask_weight: float = 0.01
    """Weight of the mask's binary cross-entropy."""
    retention_weight: float = 1.0
    """Weight of the retention loss."""
    output_weight: float = 1.0
    """Weight of the attention-output error in the hard phase; 0 trains on reconstruction alone, as the paper does."""
    kl_weight: float = 0.0
    """Weight, in the hard phase, of the KL divergence of the answers' logits through the frozen VLM; the paper has no
    such loss."""
    train_values: bool = False
    """Also train the value basis in the hard phase, away from the PCA of the paper, towards a small attention-output
    error."""
    ridge: float = 1e-4
    """Ridge of the closed-form reconstruction, relative to the mean token energy."""
    mask_init: str = "greedy"
    """Tokens that the mask begins with: "greedy" (pivoted Cholesky on the key moments), "even" or "random"."""
    refit: bool = True
    """Solve a linear reconstruction in closed form when the mask hardens."""

    def __post_init__(self) -> None:
        require_at_least_zero(self, "optim", "soft_steps", "hard_steps", "output_weight", "kl_weight")
        if self.mask_init not in ("greedy", "even", "random"):
            raise ConfigError(f"--optim.mask_init {self.mask_init!r} is neither greedy, even nor random.")


@dataclass(frozen=True)
class KVCapsuleRecipe(Recipe):
    """A training run of the family kvcapsule."""

    family: str = "kvcapsule"
    codec: KVCapsuleShape = field(default_factory=KVCapsuleShape)
    """Shape of the codecs."""
    optim: OptimOptions = field(default_factory=OptimOptions)
    """Learning of a KVCapsule."""

    def mean_ratios(self) -> tuple[float, float]:
        """Mean retention of keys and values: that of --compression, split by key_share; what one cannot use goes to the
        other."""
        keys, values = 2 * self.retention * self.codec.key_share, 2 * self.retention * (1 - self.codec.key_share)
        keys, values = min(1.0, keys + max(0.0, values - 1.0)), min(1.0, values + max(0.0, keys - 1.0))
        return (
            keys if self.codec.key_retention is None else self.codec.key_retention,
            values if self.codec.value_retention is None else self.codec.value_retention,
        )

    def by_layer(self, mean: float, layers: int) -> tuple[float, ...]:
        """The retention of each layer, of keys or of values, from their mean."""
        weights = self.codec.layer_weights
        if weights is None:
            return pyramid(mean, layers, self.codec.pyramid)
        if len(weights) != layers:
            raise ConfigError(
                f"--codec.layer_weights has {len(weights)} numbers, but {layers} layers of the model get a codec: give"
                " one for each, or none (--codec.layer_weights null)."
            )
        return weighted(mean, weights)
