"""Training of the kvcapsule family: closed form, then a soft mask, then a hard mask."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from kvcapsule.cli.tables import Column, ReportTable
from kvcapsule.codec import CodecConfig, PairCodec
from kvcapsule.codec.kvcapsule import KVCapsuleConfig, PcaValues, RetainedKeys
from kvcapsule.methods.ratios import retained
from kvcapsule.vlm.geometry import KVGeometry

from ..capsule_fit import CapsuleFit, mean, scheduled
from ..datamodule import Batch
from ..image_tokens import require_one_row
from ..losses import unexplained
from ..second_moments import TokenMoments, greedy_subset, principal_basis, ridge_reconstruction
from ..task import Task
from .kvcapsule_options import KVCapsuleRecipe, OptimOptions
from .soft_mask import SoftKeys, soft_keys

_SEEDS = 1_000_003
"""Between the seeds of two runs: more than there are layers."""


class LayerFit(nn.Module):
    """One layer's codecs, their relaxed form and the moments behind them."""

    def __init__(
        self,
        config: KVCapsuleConfig,
        geometry: KVGeometry,
        layer: int,
        moments: TokenMoments,
        optim: OptimOptions,
        seed: int,
    ) -> None:
        """seed: of this layer's draws, the same in every process."""
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.codec = config.build(geometry, layer)
        self.moments, self.ridge, self.refit = moments, optim.ridge, optim.refit
        stored = retained(config.key_ratios[layer], config.tile)
        initial = _initial(optim.mask_init, moments.key_gram, stored, random)
        theta = ridge_reconstruction(moments.key_gram, initial, optim.ridge)
        self.soft: SoftKeys = soft_keys(config, geometry, layer, initial, theta, random)
        values = self.codec.values
        assert isinstance(values, PcaValues)
        values.basis.requires_grad_(optim.train_values)
        values.basis.data.copy_(principal_basis(moments.centred_value_gram(), values.basis.shape[1]))
        values.mean.copy_(moments.value_mean())

    def harden(self) -> None:
        """Fix the retained set; a linear reconstruction is solved anew for it."""
        self.soft.harden(self.codec.keys)
        keys = self.codec.keys
        if self.refit and isinstance(keys, RetainedKeys):
            with torch.no_grad():
                keys.theta.copy_(ridge_reconstruction(self.moments.key_gram, keys.kept, self.ridge))


def _config(task: Task[KVCapsuleRecipe]) -> KVCapsuleConfig:
    """The sizes of the codecs of a run."""
    recipe, layers = task.recipe, task.layers
    keys, values = recipe.mean_ratios()
    return KVCapsuleConfig(
        tile=task.tile,
        canonical_frame=recipe.codec.canonical_frame,
        key_ratios=recipe.by_layer(keys, layers),
        value_ratios=recipe.by_layer(values, layers),
        key_decoder=recipe.codec.key_decoder,
        hidden=recipe.codec.hidden,
    )


class KVCapsuleFit(CapsuleFit[KVCapsuleRecipe]):
    """The paper's training, with an attention-output loss beside it (training/NOTES.md)."""

    recipe_class = KVCapsuleRecipe
    rate_option = "optim.lr"
    has_unused_parameters = True
    """Mask and reconstruction are trained one after the other, so that some parameters of a step have no gradient."""

    hardened: torch.Tensor

    def __init__(self, task: Task[KVCapsuleRecipe]) -> None:
        super().__init__(task)
        self.config = _config(task)
        self.optim = task.recipe.optim
        self.has_kl = self.optim.kl_weight > 0
        self.register_buffer("hardened", torch.tensor(False))

    @property
    def steps(self) -> int:
        return self.optim.soft_steps + self.optim.hard_steps

    def require_feasible(self, tiles: int | None) -> None:
        require_one_row(2 / sum(self.task.recipe.mean_ratios()), self.task.tile)

    def prepare(self) -> None:
        self._build(self.task.recipe.moment_batches)

    def restore(self, config: CodecConfig, layers: Mapping[str, torch.Tensor]) -> None:
        # One batch gives everything its size.
        self._build(1)
        self.layers.load_state_dict(layers)

    def _build(self, batches: int) -> None:
        """Layers from the moments of so many batches."""
        geometry, tile, seed = self.task.geometry, self.task.tile, self.task.recipe.seed
        moments = [TokenMoments(geometry.kv_heads, tile, geometry.head_dim).to(device) for device in self.devices]
        for batch in self.batches(batches, "moments of keys and values"):
            self.stream(batch, lambda number, layers: moments[number].add(layers[0]))
        for moment in moments:
            self.reduce(moment)
        self.layers = nn.ModuleList(
            LayerFit(self.config, geometry, i, moment, self.optim, seed * _SEEDS + i)
            for i, moment in enumerate(moments)
        )

    def codec_config(self) -> KVCapsuleConfig:
        return self.config

    def codec(self, index: int) -> PairCodec:
        return self._layer(index).codec

    def finish(self) -> None:
        if not self.hardened:
            self.harden()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.hardened and self.global_step >= self.optim.soft_steps:
            self.harden()

    def harden(self) -> None:
        for index in range(len(self.layers)):
            self._layer(index).harden()
        self.hardened.fill_(True)

    def temperature(self) -> float:
        """Falls geometrically over the soft steps."""
        start, end = self.optim.temperature_start, self.optim.temperature_end
        done = min(1.0, self.global_step / max(1, self.optim.soft_steps - 1))
        return float(start * (end / start) ** done)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self._hard_loss(batch) if self.hardened else self._soft_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        masks = [p for name, p in self.named_parameters() if name.endswith("soft.logits")]
        rest = [p for name, p in self.named_parameters() if not name.endswith("soft.logits")]
        return scheduled(
            [{"params": rest, "lr": self.optim.lr}, {"params": masks, "lr": self.optim.mask_lr}],
            self.optim.lr,
            self._rate,
        )

    def derived(self) -> ReportTable:
        config, tile = self.config, self.task.tile
        keys, values = self.task.recipe.mean_ratios()
        table = ReportTable(
            [*map(Column, ("layer", "key rows", "value rows", "of", "stored less"))],
            title=(
                f"{self.task.recipe.model}: tiles of {tile} visual tokens, mean ratio keys {keys:.3f}, values"
                f" {values:.3f}"
            ),
        )
        for i, layer in enumerate(self.task.geometry.capsule_layers):
            m_keys, m_values = retained(config.key_ratios[i], tile), retained(config.value_ratios[i], tile)
            table.add(str(layer), str(m_keys), str(m_values), str(tile), f"{2 * tile / (m_keys + m_values):.2f}x")
        return table

    def _layer(self, index: int) -> LayerFit:
        layer = self.layers[index]
        assert isinstance(layer, LayerFit)
        return layer

    def _rate(self, step: int) -> float:
        """Constant while the mask is soft, then a cosine to zero."""
        done = (step - self.optim.soft_steps) / max(1, self.optim.hard_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

    def _soft_loss(self, batch: Batch) -> torch.Tensor:
        temperature = self.temperature()
        by_layer = []
        for index, layer in enumerate(self.harvest(batch)):
            soft = self._layer(index).soft
            by_layer.append(
                {
                    "keys_unexplained": unexplained(soft(layer.keys.float(), temperature), layer.keys),
                    "mask": soft.mask_loss(temperature),
                    "ratio": soft.ratio_loss(temperature),
                }
            )
        losses = mean(by_layer)
        # As the errors of the hard mask, some of which have the same names.
        self.log_errors("train", losses, len(batch.answers))
        self.log("temperature", temperature)
        weighted = self.optim.mask_weight * losses["mask"] + self.optim.retention_weight * losses["ratio"]
        return losses["keys_unexplained"] + weighted

    def _hard_loss(self, batch: Batch) -> torch.Tensor:
        layers, segments, kl = self.code_batch(batch, self.has_kl)
        errors = mean([self.errors(segment, layer) for segment, layer in zip(segments, layers, strict=True)])
        self.log_errors("train", errors, len(batch.answers))
        loss = errors["keys_unexplained"] + self.optim.output_weight * errors["output_error"]
        if kl is not None:
            self.log("train/kl", kl, prog_bar=True)
            loss = loss + self.optim.kl_weight * kl
        return loss


def _initial(how: str, gram: torch.Tensor, stored: int, random: torch.Generator) -> torch.Tensor:
    tile = gram.shape[-1]
    if how == "greedy":
        return greedy_subset(gram, stored)
    if how == "random":
        return torch.randperm(tile, generator=random)[:stored].sort().values.to(gram.device)
    return ((torch.arange(stored, device=gram.device) + 0.5) * tile / stored).long()
