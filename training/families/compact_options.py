"""Options of the family compact."""

from dataclasses import dataclass, field

from ..recipe import PyramidOptions, Recipe, require_at_least_zero


@dataclass(frozen=True)
class CompactOptions:
    """Shape and learning of a compact capsule."""

    bank: int = 512
    """Training queries of each KV head that attention is matched for."""
    ridge: float = 1e-3
    """Pull of the refit values towards plain means."""
    selector: str = "attention"
    """How tokens are ranked: "attention" (of the query bank) or "learned" (a network that imitates the greedy
    choice)."""
    passes: int = 2
    """How many times tokens are ranked again by what each adds to the tokens ranked above it."""
    hidden: int = 64
    """Width of the learned selector."""
    steps: int = 200
    """Steps of its training."""
    lr: float = 3e-3
    """Peak learning rate of Adam; it decays linearly."""

    def __post_init__(self) -> None:
        require_at_least_zero(self, "compact", "steps", "lr")


@dataclass(frozen=True)
class CompactRecipe(Recipe):
    """A training run of the family compact."""

    family: str = "compact"
    codec: PyramidOptions = field(default_factory=PyramidOptions)
    """Shape of the codecs."""
    compact: CompactOptions = field(default_factory=CompactOptions)
    """Shape and learning of a compact capsule."""
