"""Training that the families of coded coefficients share: gradient descent through the quantiser, and the metric of the
answers' logits."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from kvcapsule.codec.coefficient_transform import CellTransform
from kvcapsule.codec.noise_shaping import TokenWeighting
from kvcapsule.errors import ConfigError

from ..capsule_fit import CapsuleFit, Task, scheduled
from ..datamodule import Batch
from ..fisher import FisherSums, gradients, mixed, require_finite_gradients
from ..harvest import LayerHarvest
from ..losses import full_output, output_error
from ..second_moments import Moments
from .bit_budget import BitBudget
from .closed_form import Tiles, require_samples
from .coding_source import LEAST_STEP
from .coefficient_options import CoefficientRecipe
from .grouping import joint_heads

_COARSE = 0.8
"""Bits an element up to which the learning rate is the recipe's."""
_WARMUP = 10
"""Steps over which the learning rate rises."""

C = TypeVar("C", bound=CoefficientRecipe, covariant=True)


class CoefficientFit(CapsuleFit[C], Generic[C]):
    """Closed forms, solved by `prepare`, then Adam on all that is continuous."""

    has_kl = True
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

    def require_feasible(self, tiles: int | None) -> None:
        self.require_budget()
        if tiles is not None:
            require_samples(tiles, self.task.tile, self.task.geometry.head_dim * self.heads)

    def require_budget(self) -> None:
        """Raises ConfigError if the compression leaves no byte for codes."""
        self.budget.code_bytes(2 * self.task.layers)

    @abstractmethod
    def sources(self, layers: Sequence[LayerHarvest], gradients: bool = False) -> Tiles:
        """Number and tiles [E, S, T, W] of each source, in its coordinates.

        gradients: whether the layers hold gradients in place of keys and values: other coordinates map these by their
            inverse transpose.
        """

    @property
    def steps(self) -> int:
        return self.options.steps

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        options, loss = self.options, torch.zeros((), device=self.device)
        layers, segments, kl = self.read(batch, options.kl_weight > 0)
        if options.output_weight:
            error = torch.stack(
                [output_error(x, s, full_output(x)) for x, s in zip(layers, segments, strict=True)]
            ).mean()
            self.log("train/output_error", error, prog_bar=True)
            loss = loss + options.output_weight * error * len(layers)
        if kl is not None:
            self.log("train/kl", kl, prog_bar=True)
            loss = loss + options.kl_weight * kl
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

    def fisher_metrics(self, baseline: list[torch.Tensor], moments: list[Moments]) -> list[torch.Tensor]:
        """Metrics [S, W, W] of the sources: the Fisher information of the answers' logits where the present layers'
        code leaves keys and values, mixed with the baseline metrics."""
        task, canonical = self.task, self.task.recipe.codec.canonical_frame
        sums = [FisherSums(*metric.shape[:2]).to(metric.device) for metric in baseline]
        for step, batch in enumerate(self.batches(self.options.fisher_batches, "Fisher information of the logits")):
            layers = self.harvest(batch)
            with torch.no_grad():
                read = self.segments(layers)
            seeds = [task.recipe.seed + n for n in self.numbers(step, len(batch.answers))]
            slopes = gradients(task.model, batch, task.tile, canonical, layers, read, seeds)
            require_finite_gradients(slopes, task.geometry.capsule_layers)
            for number, g in self.sources(slopes, gradients=True):
                sums[number].add(g)
        for of_source in sums:
            self.reduce(of_source)
        return mixed(sums, baseline, moments)

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
