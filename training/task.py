"""A training run's recipe and all that it names, loaded."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rich.console import Console
from transformers import PreTrainedModel

from kvcapsule.vlm.geometry import KVGeometry

from .datamodule import Questions
from .recipe import FSDP, Recipe

R = TypeVar("R", bound=Recipe, covariant=True)


@dataclass(frozen=True)
class Task(Generic[R]):
    """The recipe of a run and all that it names, loaded."""

    recipe: R
    model: PreTrainedModel
    data: Questions
    geometry: KVGeometry
    tile: int
    """Visual tokens of a tile."""
    visual: int = 0
    """Visual tokens of a question, as far as the first held-out ones tell."""
    console: Console = field(default_factory=lambda: Console(stderr=True))

    @property
    def sharded(self) -> bool:
        """Whether each of several processes holds but a share of the model."""
        return self.recipe.trainer.strategy == FSDP and self.recipe.trainer.processes > 1

    @property
    def layers(self) -> int:
        """Number of layers that get codecs: those with full attention."""
        return len(self.geometry.capsule_layers)
