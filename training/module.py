"""KVCapsule training as a LightningModule: soft mask, then hard mask. The frozen VLM is no part of its state."""

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.codec import LayerCodec
from kvcapsule.codec.kvcapsule import KVCapsuleConfig, PcaValues, RetainedKeys, retained
from kvcapsule.geometry import KVGeometry
from kvcapsule.segment import Segment

from .harvest import LayerHarvest, harvest
from .losses import full_output, output_error, unexplained
from .moments import TokenMoments, greedy_subset, principal_basis, ridge_reconstruction
from .relaxed import SoftKeys, soft_keys


@dataclass(frozen=True)
class OptimConfig:
    """How the codecs learn."""

    soft_steps: int = 120
    """Steps with the soft mask, its temperature falling."""
    hard_steps: int = 120
    """Steps with the hard mask, on reconstruction and attention output."""
    lr: float = 1e-3
    """Peak learning rate of Adam, for reconstructions."""
    mask_lr: float = 2e-2
    """Learning rate of the mask logits."""
    temperature_start: float = 1.0
    """Temperature of the mask at the first step."""
    temperature_end: float = 0.1
    """Temperature at the last soft step; it falls geometrically."""
    mask_weight: float = 0.01
    """Weight of the mask's binary cross-entropy."""
    ratio_weight: float = 1.0
    """Weight of the retention-ratio loss."""
    output_weight: float = 1.0
    """Weight of the attention-output error in the hard phase; 0 trains on reconstruction alone, as the paper does."""
    train_values: bool = False
    """Also move the value basis in the hard phase, away from the PCA of the paper, towards a small attention-output error."""
    ridge: float = 1e-4
    """Ridge of the closed-form reconstruction, relative to the mean token energy."""
    mask_init: str = "greedy"
    """Where the mask begins: "greedy" (pivoted Cholesky on the key moments), "even" or "random"."""
    refit: bool = True
    """Solve a linear reconstruction in closed form when the mask hardens."""

    def __post_init__(self) -> None:
        if self.soft_steps < 0 or self.hard_steps < 0:
            raise ValueError("soft_steps and hard_steps count steps: 0 or more.")
        if self.mask_init not in ("greedy", "even", "random"):
            raise ValueError(f"mask_init {self.mask_init!r} is neither greedy, even nor random.")


class LayerFit(nn.Module):
    """One layer's codecs, their relaxed form and the moments behind them."""

    def __init__(self, config: KVCapsuleConfig, geometry: KVGeometry, layer: int, moments: TokenMoments, optim: OptimConfig) -> None:
        super().__init__()
        self.codec: LayerCodec = config.build(geometry, layer)
        self.moments, self.ridge, self.refit = moments, optim.ridge, optim.refit
        stored = retained(config.key_ratios[layer], config.tile)
        initial = _initial(optim.mask_init, moments.key_gram, stored)
        theta = ridge_reconstruction(moments.key_gram, initial, optim.ridge)
        self.soft: SoftKeys = soft_keys(config, geometry, layer, initial, theta)
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

    def segment(self, layer: LayerHarvest) -> Segment:
        """The layer's tiles as attention would read them, differentiable in the codecs."""
        key_part, value_part = self.codec.keys.encode(layer.keys.float()), self.codec.values.encode(layer.values.float())
        return Segment(owner=layer.owner, frame=layer.frame, **key_part._asdict(), **value_part._asdict())


class CapsuleFit(L.LightningModule):
    """Trains the codecs of every layer at once on the harvest of a frozen VLM."""

    hardened: torch.Tensor

    def __init__(self, model: PreTrainedModel, config: KVCapsuleConfig, geometry: KVGeometry, layers: list[LayerFit], optim: OptimConfig):
        super().__init__()
        # In a tuple, so that Lightning neither saves nor moves nor trains it.
        self._frozen = (model,)
        self.config, self.geometry, self.optim = config, geometry, optim
        self.layers = nn.ModuleList(layers)
        self.register_buffer("hardened", torch.tensor(False))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.hardened and self.global_step >= self.optim.soft_steps:
            self.harden()

    def on_fit_end(self) -> None:
        if not self.hardened:
            self.harden()

    def harden(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, LayerFit)
            layer.harden()
        self.hardened.fill_(True)

    def temperature(self) -> float:
        """Falls geometrically over the soft steps."""
        start, end = self.optim.temperature_start, self.optim.temperature_end
        done = min(1.0, self.global_step / max(1, self.optim.soft_steps - 1))
        return float(start * (end / start) ** done)

    def training_step(self, batch: BatchFeature, batch_idx: int) -> torch.Tensor:
        loss = self._hard_loss(batch, "train") if self.hardened else self._soft_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: BatchFeature, batch_idx: int) -> None:
        if self.hardened:
            self._hard_loss(batch, "validation")

    def configure_optimizers(self) -> dict[str, Any]:
        masks = [p for name, p in self.named_parameters() if name.endswith("soft.logits")]
        rest = [p for name, p in self.named_parameters() if not name.endswith("soft.logits")]
        optimizer = torch.optim.Adam([{"params": rest, "lr": self.optim.lr}, {"params": masks, "lr": self.optim.mask_lr}])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Constant while the mask is soft, then a cosine to zero."""
        done = (step - self.optim.soft_steps) / max(1, self.optim.hard_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

    def _harvest(self, batch: BatchFeature) -> list[LayerHarvest]:
        return harvest(self._frozen[0], batch, self.config.tile, self.config.canonical_frame)

    def _log_errors(self, under: str, errors: torch.Tensor, batch: int) -> None:
        self.log_dict({f"{under}/{name}": error for name, error in zip(_ERRORS, errors, strict=True)}, batch_size=batch, sync_dist=True)

    def _soft_loss(self, batch: BatchFeature) -> torch.Tensor:
        temperature = self.temperature()
        lost = mask = ratio = torch.zeros((), device=self.device)
        for fit, layer in zip(self.layers, self._harvest(batch), strict=True):
            assert isinstance(fit, LayerFit)
            lost = lost + unexplained(fit.soft(layer.keys.float(), temperature), layer.keys)
            mask = mask + fit.soft.mask_loss(temperature)
            ratio = ratio + fit.soft.ratio_loss(temperature)
        n = len(self.layers)
        self.log_dict({"train/keys_unexplained": lost / n, "train/mask": mask / n, "train/ratio": ratio / n, "temperature": temperature})
        return (lost + self.optim.mask_weight * mask + self.optim.ratio_weight * ratio) / n

    def _hard_loss(self, batch: BatchFeature, stage: str) -> torch.Tensor:
        totals = torch.zeros(3, device=self.device)
        for index, (fit, layer) in enumerate(zip(self.layers, self._harvest(batch), strict=True)):
            assert isinstance(fit, LayerFit)
            segment = fit.segment(layer)
            plain = Segment(segment.keys, segment.values, segment.owner, **_maps(segment))
            keys, values = plain.materialize()
            errors = torch.stack(
                [
                    unexplained(keys, layer.keys),
                    unexplained(values, layer.values),
                    output_error(layer, segment, full_output(layer)),
                ]
            )
            totals = totals + errors
            if stage == "validation":
                self._log_errors(f"validation/layer{index}", errors, len(batch["input_ids"]))
        totals = totals / len(self.layers)
        self._log_errors(stage, totals, len(batch["input_ids"]))
        return totals[0] + self.optim.output_weight * totals[2]


_ERRORS = ("keys_unexplained", "values_unexplained", "output_error")


def _maps(segment: Segment) -> dict[str, Any]:
    """The maps of a segment without its frame: tiles in their canonical frames, as they were harvested."""
    return {name: getattr(segment, name) for name in ("score_map", "value_map", "value_mean", "q_map", "out_map")}


def _initial(how: str, gram: torch.Tensor, stored: int) -> torch.Tensor:
    tile = gram.shape[-1]
    if how == "greedy":
        return greedy_subset(gram, stored)
    if how == "random":
        return torch.randperm(tile, device=gram.device)[:stored].sort().values
    return ((torch.arange(stored, device=gram.device) + 0.5) * tile / stored).long()
