"""Training that the families of coded coefficients share: gradient descent through the quantiser, and the metric of the
answers' logits."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from kvcapsule.codec.coefficient_transform import CellTransform
from kvcapsule.codec.grouping import joint_heads
from kvcapsule.codec.noise_shaping import TokenWeighting
from kvcapsule.errors import ConfigError
from kvcapsule.segments.segment import Segment
from kvcapsule.training_footprint import FISHER, TrainingSize

from ..capsule_fit import CapsuleFit, on_one_device, scheduled
from ..datamodule import Batch
from ..fisher import FisherSums, GradientSink, each_gradient
from ..harvest import LayerHarvest
from ..losses import full_output, output_error
from ..question_forward import Surroundings
from ..task import Task
from ..tile_sample import LayerTiles
from .bit_budget import BitBudget
from .closed_form import EachTiles, Tiles, Use, require_samples
from .coding_source import LEAST_STEP
from .coefficient_options import CoefficientRecipe

_COARSE = 0.8
"""Bits an element up to which the learning rate is the recipe's."""
_WARMUP = 10
"""Steps over which the learning rate rises."""

C = TypeVar("C", bound=CoefficientRecipe, covariant=True)


class CoefficientFit(CapsuleFit[C], Generic[C]):
    """Closed forms, solved by `prepare`, then Adam on all that is continuous."""

    has_kl = True
    together = False
    """Whether the parts of a layer group are coded as one."""
    rate_option = "transform.lr"
    reuses_harvests = True

    def __init__(self, task: Task[C]) -> None:
        super().__init__(task)
        geometry, self.options = task.geometry, task.recipe.transform
        self.heads = self.options.joint_heads or joint_heads(geometry.kv_heads, geometry.head_dim)
        if geometry.kv_heads % self.heads:
            raise ConfigError(
                f"--transform.joint_heads {self.heads} does not divide the model's {geometry.kv_heads} KV heads:"
                " choose a divisor."
            )
        self.budget = BitBudget(
            geometry,
            task.tile,
            task.recipe.element_bits,
            framed=geometry.rotary != "none" and task.recipe.codec.canonical_frame,
            max_map_mib=self.options.max_map_mib,
            show=self.show,
        )

    def held(self) -> dict[str, int]:
        return {stage.title: stage.bytes for stage in self.size().stages()}

    def size(self) -> TrainingSize:
        """Of the run, for a question's images of the size of the first held-out ones."""
        task, recipe, first = self.task, self.task.recipe, self.groups[0]
        return TrainingSize(
            layers=task.layers,
            query_heads=task.geometry.query_heads,
            kv_heads=task.geometry.kv_heads,
            head_dim=task.geometry.head_dim,
            tile=task.tile,
            visual=task.visual // task.tile * task.tile,
            batch=recipe.batch,
            element=task.model.dtype.itemsize,
            harvest_batches=recipe.moment_batches,
            probe_batches=self.options.probe_batches,
            fisher_batches=self.options.fisher_batches,
            together=self.together,
            group=len(first),
            heads=self.heads,
        )

    def require_feasible(self, tiles: int | None) -> None:
        self.require_budget()
        if tiles is not None:
            require_samples(tiles, self.task.tile, self.task.geometry.head_dim * self.heads)

    def require_budget(self) -> None:
        """Raises ConfigError if the compression leaves no byte for codes."""
        self.budget.code_bytes(2 * self.task.layers)

    @abstractmethod
    def sources(self, number: int, layers: Sequence[LayerTiles], gradients: bool = False) -> Tiles:
        """Number and tiles [E, S, T, W] of each source of a layer group, in its coordinates.

        Args:
            number: of the group.
            layers: of the group.
            gradients: whether the layers hold gradients in place of keys and values: other coordinates map these by
                their inverse transpose.
        """

    def all_sources(self, title: str) -> EachTiles:
        """The same of the tiles of all groups; title: of the progress where the frozen VLM has to run."""

        def hand_on(use: Use) -> None:
            def of_group(number: int, layers: Sequence[LayerTiles]) -> None:
                for source, x in self.sources(number, layers):
                    use(source, x)

            self.each_tiles(title, of_group)

        return hand_on

    @property
    def steps(self) -> int:
        return self.options.steps

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        options, losses = self.options, list[torch.Tensor]()
        layers, segments, kl = self.code_batch(batch, options.kl_weight > 0)
        if options.output_weight:
            error = on_one_device(
                [output_error(x, s, full_output(x)) for x, s in zip(layers, segments, strict=True)]
            ).mean()
            self.log("train/output_error", error, prog_bar=True)
            losses.append(options.output_weight * error * len(layers))
        if kl is not None:
            self.log("train/kl", kl, prog_bar=True)
            losses.append(options.kl_weight * kl)
        loss = on_one_device(losses).sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # The quantiser's error halves with each bit, and what moves the bases by more than that makes a fine code
        # worse.
        lr = self.options.lr * min(1.0, 2.0 ** (_COARSE - self.task.recipe.element_bits))
        return scheduled(self.layers.parameters(), lr, self._rate, betas=(0.9, 0.98))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for codec in self.layers.modules():
                if isinstance(codec, CellTransform):
                    codec.step.clamp_min_(LEAST_STEP)

    def fisher_sums(self, sizes: Sequence[tuple[int, int]]) -> list[FisherSums]:
        """The Fisher information of the answers' logits with respect to each source, where the present layers' code
        leaves keys and values; sizes: S and W of each."""
        task, sums = self.task, [FisherSums(*size) for size in sizes]
        for step, batch in enumerate(self.batches(self.options.fisher_batches, FISHER)):
            read: list[Segment] = []
            around: list[Surroundings] = []

            def visit(number: int, layers: list[LayerHarvest], read: Any = read, around: Any = around) -> None:
                with torch.no_grad():
                    read += self.stored(number, layers)
                around += [Surroundings.of(layer) for layer in layers]

            self.stream(batch, visit)
            seeds = [task.recipe.seed + n for n in self.numbers(step, len(batch.answers))]
            sink = GradientSink(self.groups, task.geometry.capsule_layers, partial(self._feel, sums))
            each_gradient(self.harvests.forward_of(batch, around), read, batch.answers, seeds, sink.take)
        for of_source in sums:
            self.reduce(of_source)
        return sums

    def _feel(self, sums: Sequence[FisherSums], number: int, layers: Sequence[LayerTiles]) -> None:
        for source, g in self.sources(number, layers, gradients=True):
            sums[source].to(g.device).add(g)

    def query_bank(self, queries: Sequence[torch.Tensor]) -> TokenWeighting | None:
        """The query bank of layers that one code serves, given the queries [H, Q, D] of each; None where there are
        none."""
        if not queries:
            return None
        queries_LHQD = torch.stack(list(queries))
        bank = TokenWeighting(queries_LHQD.shape, self.heads).to(queries_LHQD.device)
        bank.queries.copy_(queries_LHQD)
        return bank

    def _rate(self, step: int) -> float:
        """A short rise, then a cosine to zero."""
        return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps))))
