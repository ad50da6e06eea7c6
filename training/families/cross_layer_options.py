"""Options of the family cross-layer."""

from dataclasses import dataclass, field

from ..recipe import require_at_least_zero
from .coefficient_options import CoefficientOptions, CoefficientRecipe


@dataclass(frozen=True)
class CrossLayerOptions(CoefficientOptions):
    """Shape and learning of a transform code."""

    joint_layers: int = 0
    """Layers that are coded together, keys and values alike; 0 takes as many as have 512 channels in all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_zero(self, "transform", "joint_layers")


@dataclass(frozen=True)
class CrossLayerRecipe(CoefficientRecipe):
    """A training run of the family cross-layer."""

    family: str = "cross-layer"
    transform: CrossLayerOptions = field(default_factory=CrossLayerOptions)
    """Shape and learning of a transform code."""
