"""What the training of every family has in common: a LightningModule over the harvest of a frozen VLM, which is no part
of its state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from kvcapsule.capsule.lean_tensors import round_as_written
from kvcapsule.cli.tables import ReportTable, print_report
from kvcapsule.codec import REGISTRY, CodecConfig, LayerCodec, LayerGroupCodec
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.placement import on_several_devices

from .datamodule import Batch
from .frozen_forward import divergence
from .harvest import LayerHarvest, harvest_with_logits
from .harvesting_fit import HarvestingFit
from .losses import full_output, output_error, unexplained
from .question_forward import DecodedReading, Reading, SegmentReading, Surroundings, decoded
from .recipe import Recipe
from .run_state import load_closed_form, save_closed_form
from .sharded_model import share_out
from .task import R
from .task import Task as Task

_ROWS_READ = "training_rows"
"""Key of a checkpoint."""


class CodedBatch(NamedTuple):
    """A batch's harvest, and its tiles as the codecs code them."""

    layers: list[LayerHarvest]
    segments: list[Segment]
    """The coded tiles of each layer, differentiable in the codecs."""
    kl: torch.Tensor | None
    """KL divergence of the answers' logits, where it was asked for."""


Errors = dict[str, torch.Tensor]
"""Losses of a layer by name."""


class CapsuleFit(HarvestingFit[R], ABC):
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
    layers: nn.ModuleList
    prepared = False

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

    def complete(self) -> None:
        """No step is left: the codecs are finished, and are measured as they will be saved."""
        self.finish()
        for index in range(len(self.layers)):
            round_as_written(self.codec(index))

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
        self.layers = nn.ModuleList(config.build(geometry, layer) for layer in first)
        self.layers.load_state_dict(layers)
        self.move_beside_layers()

    def move_beside_layers(self) -> None:
        """Move each codec to the device of the layers that it codes."""
        for group, codec in zip(self.groups, self.layers, strict=True):
            codec.to(self.devices[group[0]])

    def setup(self, stage: str) -> None:
        if self.prepared:
            return
        self._place_model(self.trainer.strategy.root_device)
        self._prepare_or_restore()
        self.harvests.close()
        self.prepared = True
        if not self.steps:
            self.complete()
        print_report(self.derived(), console=self.task.console)

    def _place_model(self, device: torch.device) -> None:
        model = self.task.model
        if self.task.sharded:
            share_out(model, device)
        elif not on_several_devices(model):
            to: Any = model.to
            to(device)

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

    def on_validation_end(self) -> None:
        self.task.data.rows_read.gather()

    def stored(self, number: int, layers: Sequence[LayerHarvest]) -> list[Segment]:
        """A layer group's tiles as a capsule would store them."""
        codec = self.codec(number)
        pairs = [(layer.keys.float(), layer.values.float()) for layer in layers]
        if isinstance(codec, LayerCodec):
            encoded = [codec.encode(*pair) for pair in pairs]
        else:
            encoding = codec.start()
            for place, pair in enumerate(pairs):
                encoding.add(place, *pair)
            encoded = encoding.finish(range(len(layers)))
        return [one.segment(layer.owner, layer.frame) for one, layer in zip(encoded, layers, strict=True)]

    def code_batch(self, batch: Batch, with_kl: bool) -> CodedBatch:
        """Harvest a batch and code its tiles; with_kl: also run it through the frozen VLM with
        their segments in its attention."""
        if not with_kl:
            layers = self.harvest(batch)
            return CodedBatch(layers, self.segments(layers), None)
        task, canonical, last = self.task, self.task.recipe.codec.canonical_frame, int(batch.answers.max()) + 1
        layers, logits = harvest_with_logits(task.model, batch.inputs, task.tile, canonical, last, batch.alignment)
        segments = self.segments(layers)
        readings = [SegmentReading(segment) for segment in segments]
        return CodedBatch(layers, segments, self._kl(batch, logits, readings, [Surroundings.of(x) for x in layers]))

    def _kl(
        self, batch: Batch, true: torch.Tensor, readings: Sequence[Reading], around: Sequence[Surroundings]
    ) -> torch.Tensor:
        """KL of the answers' logits through the frozen VLM that reads so, from the true ones."""
        through = self.harvests.forward_of(batch, around)(readings, true.shape[1])
        return divergence(true, through, batch.answers)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        indices = self.task.geometry.capsule_layers
        by_layer: list[Errors] = []
        readings: list[Reading] = []
        around: list[Surroundings] = []

        def visit(number: int, layers: list[LayerHarvest]) -> None:
            for segment, layer in zip(self.stored(number, layers), layers, strict=True):
                by_layer.append(self.errors(decoded(segment), layer))
                if self.has_kl:
                    readings.append(DecodedReading(segment))
                    around.append(Surroundings.of(layer))

        logits = self.harvests.stream(batch, visit, int(batch.answers.max()) + 1 if self.has_kl else 0)
        for index, errors in zip(indices, by_layer, strict=True):
            self.log_errors(f"validation/layer{index}", errors, len(batch.answers))
        self.log_errors("validation", mean(by_layer), len(batch.answers))
        if logits is not None:
            self.log(
                "validation/kl",
                self._kl(batch, logits, readings, around),
                batch_size=len(batch.answers),
                sync_dist=True,
            )

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
    return {name: on_one_device([of_layer[name] for of_layer in errors]).mean() for name in common}


def on_one_device(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Numbers of several layers side by side, on the device of the first."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def scheduled(
    parameters: Any, lr: float, rate: Callable[[int], float], betas: tuple[float, float] = (0.9, 0.999)
) -> OptimizerLRSchedulerConfig:
    """Adam with a schedule by steps, as Lightning takes it."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
