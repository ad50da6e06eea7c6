"""Options of the family transform."""

from dataclasses import dataclass, field

from kvcapsule.errors import ConfigError

from ..recipe import PyramidOptions
from .coefficient_options import CoefficientOptions, CoefficientRecipe


@dataclass(frozen=True)
class TransformOptions(CoefficientOptions):
    """Shape and learning of a transform code."""

    allocation: str = "output"
    """How layers share the bits: "output" (by what each bit saves in attention's output), "pyramid" (see
    --codec.pyramid) or "uniform"."""
    key_bits: float | None = None
    """Mean bits of an element of the keys, in place of what the allocation would give them."""
    value_bits: float | None = None
    """Mean bits of an element of the values, likewise; give both or neither."""

    @property
    def fisher_batches(self) -> int:
        return super().fisher_batches if self.allocation == "output" else self.logit_batches or 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ("output", "pyramid", "uniform"):
            raise ConfigError(f"--transform.allocation {self.allocation!r} is neither output, pyramid nor uniform.")
        if (self.key_bits is None) != (self.value_bits is None):
            raise ConfigError("--transform.key_bits and --transform.value_bits fix two budgets: give both or neither.")
        if self.allocation != "output" and (self.logit_batches or self.key_bits is not None):
            raise ConfigError(
                f"--transform.allocation {self.allocation} shares the bits out by itself: leave"
                " --transform.logit_batches, --transform.key_bits and --transform.value_bits out, or the allocation."
            )
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if bits is not None and not 0 <= bits <= 8:
                raise ConfigError(f"--transform.{name} {bits} is outside 0 to 8 bits an element.")


@dataclass(frozen=True)
class TransformRecipe(CoefficientRecipe):
    """A training run of the family transform."""

    family: str = "transform"
    codec: PyramidOptions = field(default_factory=PyramidOptions)
    """Shape of the codecs."""
    transform: TransformOptions = field(default_factory=TransformOptions)
    """Shape and learning of a transform code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec.pyramid and self.transform.allocation != "pyramid":
            raise ConfigError(
                f"--codec.pyramid {self.codec.pyramid} is for --transform.allocation pyramid; with"
                f" {self.transform.allocation} leave it out."
            )
