"""What the training of every family has in common: a LightningModule over the harvest of a frozen VLM, which is no part
of its state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from kvcapsule.cli.progress import tracked
from kvcapsule.cli.tables import ReportTable, print_report
from kvcapsule.codec import REGISTRY, CodecConfig, LayerCodec, LayerGroupCodec
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.geometry import KVGeometry

from .datamodule import Batch, Questions
from .frozen_forward import divergence, logits_through
from .harvest import LayerHarvest, harvest, harvest_with_logits
from .harvest_memory import HARVEST_MEMORY, HarvestMemory
from .harvest_store import HarvestStore
from .losses import full_output, output_error, unexplained
from .recipe import Recipe
from .run_state import load_closed_form, save_closed_form

_ROWS_READ = "training_rows"
"""Key of a checkpoint."""
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
    console: Console = field(default_factory=lambda: Console(stderr=True))

    @property
    def layers(self) -> int:
        """Number of layers that get codecs: those with full attention."""
        return len(self.geometry.capsule_layers)


class Read(NamedTuple):
    """A batch as the frozen VLM left it, and as the codecs would have it read."""

    layers: list[LayerHarvest]
    segments: list[Segment]
    kl: torch.Tensor | None
    """KL divergence of the answers' logits, where it was asked for."""


Errors = dict[str, torch.Tensor]
"""Losses of a layer by name."""


class CapsuleFit(L.LightningModule, ABC, Generic[R]):
    """Trains the codecs of every layer at once.

    What is solved in closed form is solved in `setup`, on this rank's share of the batches; sums are added up over the
    ranks.
    """

    recipe_class: ClassVar[type[Recipe]]
    """The family's options: a subclass of Recipe."""
    has_unused_parameters: ClassVar[bool] = False
    """Whether a step may leave some parameters without a gradient, which DDP must then look for."""
    rate_option: ClassVar[str] = ""
    """The option of the learning rate, "transform.lr"; empty without a descent."""
    reuses_harvests: ClassVar[bool] = False
    """Whether `prepare` makes several passes over the same batches, whose harvests are then held in memory."""
    layers: nn.ModuleList

    def __init__(self, task: Task[R]) -> None:
        super().__init__()
        # In a tuple, so that Lightning neither saves nor moves nor trains the model.
        self._frozen = (task,)
        recipe = task.recipe
        self._store = (
            None
            if recipe.harvests is None
            else HarvestStore(
                Path(recipe.harvests), task.model, task.tile, recipe.codec.canonical_frame, lambda line: self.show(line)
            )
        )
        self._memory = HarvestMemory(HARVEST_MEMORY if self.reuses_harvests else 0)
        self.prepared = False

    @property
    def task(self) -> Task[R]:
        """The recipe of the run and what it names, loaded: model, data, geometry."""
        return self._frozen[0]

    has_kl = False
    """Whether the KL of the logits is measured on held-out questions."""

    @property
    def steps(self) -> int:
        """Steps of gradient descent; 0 for a family with a closed form alone."""
        return 0

    @abstractmethod
    def prepare(self) -> None:
        """Build `layers`, with all that has a closed form."""

    def require_feasible(self, tiles: int | None) -> None:
        """Refuse what cannot work before the model runs.

        Args:
            tiles: most that `prepare` will see; None where that is not known.

        Raises:
            ConfigError: if they are too few, or tiles of this size cannot be stored in so few bytes.
        """

    @abstractmethod
    def codec_config(self) -> CodecConfig:
        """The sizes of the codecs, known once they are prepared."""

    @abstractmethod
    def codec(self, index: int) -> LayerCodec | LayerGroupCodec:
        """The codec of a layer, or of a stack of layers, as it is to be saved."""

    def segments(self, layers: Sequence[LayerHarvest]) -> list[Segment]:
        """The tiles of all layers as attention would read them, differentiable in the codecs; layer by layer, unless a
        family overrides it."""
        segments = []
        for index, layer in enumerate(layers):
            codec = self.codec(index)
            if not isinstance(codec, LayerCodec):
                raise TypeError(f"{type(self).__name__} trains codecs of several layers: it must override `segments`.")
            encoded = codec.encode(layer.keys.float(), layer.values.float())
            segments.append(encoded.segment(layer.owner, layer.frame))
        return segments

    def derived(self) -> ReportTable:
        """Sizes that the run derived for each layer, shown to the user once `prepare` is done."""
        return ReportTable([], title=f"{self.task.recipe.model}: tiles of {self.task.tile} visual tokens")

    def finish(self) -> None:
        """Called once, when no step is left."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_ROWS_READ] = self.task.data.rows_read.gather()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.task.data.rows_read.add(checkpoint.get(_ROWS_READ, ()))

    def restore(self, config: CodecConfig, layers: Mapping[str, torch.Tensor]) -> None:
        """Build `layers` as `prepare` left them, without its passes over the data; where they are not the codecs that
        the config builds, a family overrides it.

        Args:
            config: what `codec_config` was.
            layers: the tensors of `layers`.
        """
        geometry = self.task.geometry
        first = range(0, self.task.layers, max(1, config.layer_group))
        self.layers = nn.ModuleList(config.build(geometry, layer) for layer in first).to(self.task.model.device)
        self.layers.load_state_dict(layers)

    def setup(self, stage: str) -> None:
        if self.prepared:
            return
        model = self.task.model
        if not getattr(model, "hf_device_map", None):
            to: Any = model.to
            to(self.trainer.strategy.root_device)
        self._prepare_or_restore()
        self._memory.close()
        self.prepared = True
        if not self.steps:
            self.finish()
        print_report(self.derived(), console=self.task.console)

    def _prepare_or_restore(self) -> None:
        recipe = self.task.recipe
        kept = load_closed_form(recipe.work) if recipe.resume else None
        if kept is not None:
            self.restore(REGISTRY.find(recipe.family).config.from_dict(kept["config"]), kept["layers"])
            self.task.data.rows_read.add(kept["rows"])
            return
        self.prepare()
        rows = self.task.data.rows_read.gather()
        if self.global_rank == 0 and recipe.work.is_dir():
            save_closed_form(recipe.work, asdict(self.codec_config()), self.layers.state_dict(), rows)

    def batches(self, count: int, title: str) -> Iterator[Batch]:
        """This rank's share of the first steps' rows, those of an epoch at most: the same batches at every call."""
        loader = self.task.data.first_epoch()
        count = min(count, len(loader))
        batches = self._memory.batches(loader, count)
        return self.task.data.rows_read.noted(tracked(batches, title, count, self.task.console))

    def on_validation_end(self) -> None:
        self.task.data.rows_read.gather()

    def numbers(self, step: int, count: int) -> list[int]:
        """Of this rank's rows of a step among those of all ranks and steps: the same on any number of ranks."""
        world = 1 if self._trainer is None else self.trainer.world_size
        return [step * self.task.recipe.batch + self.global_rank + i * world for i in range(count)]

    def harvest(self, batch: Batch) -> list[LayerHarvest]:
        """Keys, values and queries of every layer: from memory or from disk where they are there, else by the frozen
        VLM."""
        return self._memory.harvest(batch, self._harvest)

    def _harvest(self, batch: Batch) -> list[LayerHarvest]:
        task = self.task
        if self._store is None:
            return harvest(task.model, batch.inputs, task.tile, task.recipe.codec.canonical_frame, batch.alignment)
        return self._store.harvest(batch.inputs, batch.alignment)

    def read(self, batch: Batch, with_kl: bool) -> "Read":
        """What the codecs make of a batch; with_kl: also run it through the frozen VLM with their segments in its
        attention."""
        if not with_kl:
            layers = self.harvest(batch)
            return Read(layers, self.segments(layers), None)
        task, canonical, last = self.task, self.task.recipe.codec.canonical_frame, int(batch.answers.max()) + 1
        layers, logits = harvest_with_logits(task.model, batch.inputs, task.tile, canonical, last, batch.alignment)
        segments = self.segments(layers)
        through = logits_through(task.model, batch.inputs, task.tile, canonical, segments, last, batch.alignment)
        return Read(layers, segments, divergence(logits, through, batch.answers))

    @rank_zero_only
    def show(self, what: object) -> None:
        self.task.console.print(what, highlight=False)

    def reduce(self, sums: nn.Module, greatest: bool = False) -> None:
        """Add up the buffers of all ranks, or take the greatest of each."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            reduction = torch.distributed.ReduceOp.MAX if greatest else torch.distributed.ReduceOp.SUM
            for buffer in sums.buffers():
                torch.distributed.all_reduce(buffer, op=reduction)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        read, layers = self.read(batch, self.has_kl), self.task.geometry.capsule_layers
        by_layer = [self.errors(segment, layer) for segment, layer in zip(read.segments, read.layers, strict=True)]
        for index, errors in enumerate(by_layer):
            self.log_errors(f"validation/layer{layers[index]}", errors, len(batch.answers))
        self.log_errors("validation", mean(by_layer), len(batch.answers))
        if read.kl is not None:
            self.log("validation/kl", read.kl, batch_size=len(batch.answers), sync_dist=True)

    def errors(self, segment: Segment, layer: LayerHarvest) -> Errors:
        """What one layer loses: of its keys, of its values (where a family rebuilds these token by token) and of
        attention's output."""
        maps = {name: getattr(segment, name) for name in ("score_map", "value_map", "value_mean", "q_map", "out_map")}
        # Without the frame: tiles in their canonical frames, as they were harvested.
        keys, values = Segment(segment.keys, segment.values, segment.owner, **maps).materialize()
        errors = {"output_error": output_error(layer, segment, full_output(layer))}
        if keys.shape == layer.keys.shape:
            errors |= {
                "keys_unexplained": unexplained(keys, layer.keys),
                "values_unexplained": unexplained(values, layer.values),
            }
        return errors

    def log_errors(self, under: str, errors: Errors, batch: int) -> None:
        self.log_dict({f"{under}/{name}": error for name, error in errors.items()}, batch_size=batch, sync_dist=True)


def mean(errors: Sequence[Errors]) -> Errors:
    """Over the layers, of what is known of all."""
    common = [name for name in errors[0] if all(name in of_layer for of_layer in errors)]
    return {name: torch.stack([of_layer[name] for of_layer in errors]).mean() for name in common}


def scheduled(
    parameters: Any, lr: float, rate: Callable[[int], float], betas: tuple[float, float] = (0.9, 0.999)
) -> OptimizerLRSchedulerConfig:
    """Adam with a schedule by steps, as Lightning takes it."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
