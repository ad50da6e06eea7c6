"""Training of the compact family: a bank of queries for each layer, then a selector that imitates the greedy choice of
tokens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from kvcapsule.cli.tables import Column, ReportTable
from kvcapsule.codec import CodecConfig
from kvcapsule.codec.compact import CompactConfig, CompactLayer
from kvcapsule.methods.ratios import pyramid, retained

from ..capsule_fit import CapsuleFit, on_one_device, scheduled
from ..datamodule import Batch
from ..harvest import LayerHarvest
from ..image_tokens import require_one_row
from ..losses import require_finite
from ..query_bank import QueryBank
from ..task import Task
from .compact_options import CompactRecipe
from .token_selector import chosen_by_teacher, imitation_loss, initialise


class Banks(NamedTuple):
    """The query banks of all layers."""

    queries: list[torch.Tensor]
    """[H, Q, D] of each layer."""
    scale: float
    """Of the scores; 0 for head_dim ** -0.5."""
    first: list[LayerHarvest]
    """The harvest of the first batch, where it was wanted."""


def query_banks(fit: CapsuleFit[Any], size: int, keeps_first: bool = False) -> Banks:
    """Sample `size` queries of each KV head that read the tiles, from the batches of all ranks.

    Args:
        fit: whose batches they are.
        size: of a bank.
        keeps_first: whether the harvest of the first batch is wanted, all layers at once.

    Raises:
        DataError: if keys, values or queries are not finite.
        ConfigError: if there are fewer queries.
    """
    geometry, seed = fit.task.geometry, fit.task.recipe.seed
    banks = [QueryBank(size, seed + i) for i in range(fit.task.layers)]
    first: list[LayerHarvest] = []
    scale = default = geometry.head_dim**-0.5
    numbers: list[int] = []

    def visit(number: int, layers: list[LayerHarvest]) -> None:
        nonlocal scale
        (layer,), scale = layers, layers[0].scale
        require_finite(layer, geometry.capsule_layers[number])
        banks[number].add(layer, numbers)
        if keeps_first and len(first) < fit.task.layers:
            first.append(layer)

    for step, batch in enumerate(fit.batches(fit.task.recipe.moment_batches, "queries that read the tiles")):
        numbers = fit.numbers(step, len(batch.answers))
        fit.stream(batch, visit)
    for bank in banks:
        bank.gather()
    scale = 0.0 if abs(scale - default) <= 1e-6 * default else scale
    return Banks([bank.bank() for bank in banks], scale, first)


class CompactFit(CapsuleFit[CompactRecipe]):
    """Nothing but the bank is needed where tokens are ranked by attention; a learned selector is trained by gradient
    descent."""

    recipe_class = CompactRecipe
    rate_option = "compact.lr"

    def __init__(self, task: Task[CompactRecipe]) -> None:
        super().__init__(task)
        self.recipe = task.recipe.compact
        self.config = CompactConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            ratios=pyramid(task.recipe.retention, task.layers, task.recipe.codec.pyramid),
            bank=self.recipe.bank,
            ridge=self.recipe.ridge,
            selector=self.recipe.selector,
            passes=self.recipe.passes,
            hidden=self.recipe.hidden,
        )

    @property
    def steps(self) -> int:
        return self.recipe.steps if self.recipe.selector == "learned" else 0

    def require_feasible(self, tiles: int | None) -> None:
        require_one_row(self.task.recipe.compression, self.task.tile)

    def prepare(self) -> None:
        geometry, seed = self.task.geometry, self.task.recipe.seed
        learned = self.recipe.selector == "learned"
        banks = query_banks(self, self.recipe.bank, keeps_first=learned)
        self.config = replace(self.config, scale=banks.scale)
        self.layers = nn.ModuleList(self.config.build(geometry, i) for i in range(self.task.layers))
        for index, bank in enumerate(banks.queries):
            codec = self.codec(index)
            codec.bank.copy_(bank)
            if codec.selector is not None:
                initialise(codec.selector, banks.first[index].keys, banks.first[index].values, seed)

    def restore(self, config: CodecConfig, layers: Mapping[str, torch.Tensor]) -> None:
        assert isinstance(config, CompactConfig)
        self.config = config
        super().restore(config, layers)

    def codec_config(self) -> CompactConfig:
        return self.config

    def codec(self, index: int) -> CompactLayer:
        codec = self.layers[index]
        assert isinstance(codec, CompactLayer)
        return codec

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        losses = []
        for index, layer in enumerate(self.harvest(batch)):
            codec, keys, values = self.codec(index), layer.keys.float(), layer.values.float()
            assert codec.selector is not None
            losses.append(imitation_loss(codec.selector, keys, values, chosen_by_teacher(codec, keys, values)))
        loss = on_one_device(losses).mean()
        self.log("train/imitation", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return scheduled(self.layers.parameters(), self.recipe.lr, lambda step: max(0.0, 1 - step / self.steps))

    def derived(self) -> ReportTable:
        config, tile = self.config, self.task.tile
        table = ReportTable(
            [*map(Column, ("layer", "rows", "of"))],
            title=f"{self.task.recipe.model}: tiles of {tile} visual tokens, a bank of {config.bank} queries",
        )
        for layer, ratio in zip(self.task.geometry.capsule_layers, config.ratios, strict=True):
            table.add(str(layer), str(retained(ratio, tile)), str(tile))
        return table
