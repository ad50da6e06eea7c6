"""Options of the family coded-compact."""

from dataclasses import dataclass, field

from kvcapsule.errors import ConfigError

from ..recipe import Recipe


@dataclass(frozen=True)
class CodedCompactOptions:
    """Shape and learning of a coded compact capsule."""

    bank: int = 512
    """Training queries of each KV head that attention is matched for."""
    ridge: float = 1e-3
    """Pull of the refit values towards plain means."""
    passes: int = 2
    """How many times tokens are ranked again by what each adds to the tokens ranked above it."""
    search_batches: int = 2
    """Batches on which rows and bits of the layers are compared, by what the answers' logits feel of attention's
    error."""

    def __post_init__(self) -> None:
        if self.search_batches < 1:
            raise ConfigError(f"--coded.search_batches {self.search_batches}: at least 1 is needed.")


@dataclass(frozen=True)
class CodedCompactRecipe(Recipe):
    """A training run of the family coded-compact."""

    family: str = "coded-compact"
    coded: CodedCompactOptions = field(default_factory=CodedCompactOptions)
    """Shape and learning of a coded compact capsule."""
