"""The retained set while it is being learned: a soft mask over tokens, trained together with the reconstruction
(KVCapsule, section 3)."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from kvcapsule.codec.kvcapsule import KVCapsuleConfig, MlpKeys, RetainedKeys
from kvcapsule.methods.ratios import retained
from kvcapsule.vlm.geometry import KVGeometry

_CONFIDENCE = 2.0
"""Logit of a token that the initial choice keeps; minus this for one that it drops."""


class SoftKeys(nn.Module, ABC):
    """Mask logits over T tokens and a reconstruction that reads all T of them, masked.

    mask = sigmoid(logits / temperature), one for all heads; while the temperature falls the mask hardens. Rows are
    masked by multiplication, as in the paper's pseudo-code.
    """

    def __init__(self, tile: int, stored: int, initial: torch.Tensor) -> None:
        """initial [stored]: the tokens that the mask begins with."""
        super().__init__()
        self.stored = stored
        logits = torch.full((tile,), -_CONFIDENCE)
        logits[initial.cpu()] = _CONFIDENCE
        self.logits = nn.Parameter(logits)

    @abstractmethod
    def rebuild(self, masked_EHTD: torch.Tensor) -> torch.Tensor:
        """All keys from the masked ones, [E, H, T, D]."""

    @abstractmethod
    def harden(self, codec: nn.Module) -> None:
        """Copy the retained set, and the reconstruction where it has none in closed form, into the codec."""

    def forward(self, k_EHTD: torch.Tensor, temperature: float) -> torch.Tensor:
        mask = torch.sigmoid(self.logits / temperature)
        return self.rebuild(k_EHTD * mask[:, None])

    def kept(self) -> torch.Tensor:
        """The tokens that remain when the mask is hard: [stored], sorted."""
        return self.logits.topk(self.stored).indices.sort().values

    def mask_loss(self, temperature: float) -> torch.Tensor:
        """Binary cross-entropy of the mask to its own hardened self: pushes every token to a decision."""
        target = torch.zeros_like(self.logits)
        target[self.kept()] = 1.0
        return F.binary_cross_entropy_with_logits(self.logits / temperature, target)

    def ratio_loss(self, temperature: float) -> torch.Tensor:
        """Squared distance of the mask's mean from the wanted retention ratio."""
        return (torch.sigmoid(self.logits / temperature).mean() - self.stored / len(self.logits)).square()


class SoftLinear(SoftKeys):
    """theta [H, T, T]; the hardened theta is solved in closed form for the retained set."""

    def __init__(self, tile: int, stored: int, initial: torch.Tensor, theta: torch.Tensor) -> None:
        """theta [H, T, stored]: reconstruction from the initial set."""
        super().__init__(tile, stored, initial)
        full = torch.zeros(theta.shape[0], tile, tile)
        full[:, :, initial.cpu()] = theta.float().cpu()
        self.theta = nn.Parameter(full)

    def rebuild(self, masked_EHTD: torch.Tensor) -> torch.Tensor:
        return self.theta @ masked_EHTD

    @torch.no_grad()
    def harden(self, codec: nn.Module) -> None:
        assert isinstance(codec, RetainedKeys)
        kept = self.kept()
        codec.kept.copy_(kept)
        codec.theta.copy_(self.theta[:, :, kept])


class SoftMlp(SoftKeys):
    """Two layers along tokens, T -> hidden -> T, per head."""

    def __init__(
        self, heads: int, tile: int, stored: int, hidden: int, initial: torch.Tensor, random: torch.Generator
    ) -> None:
        super().__init__(tile, stored, initial)
        self.inner = nn.Parameter(torch.randn(heads, hidden, tile, generator=random) / tile**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(heads, hidden, 1))
        self.outer = nn.Parameter(torch.randn(heads, tile, hidden, generator=random) / hidden**0.5)
        self.outer_bias = nn.Parameter(torch.zeros(heads, tile, 1))

    def rebuild(self, masked_EHTD: torch.Tensor) -> torch.Tensor:
        return self.outer @ F.gelu(self.inner @ masked_EHTD + self.inner_bias) + self.outer_bias

    @torch.no_grad()
    def harden(self, codec: nn.Module) -> None:
        assert isinstance(codec, MlpKeys)
        kept = self.kept()
        codec.kept.copy_(kept)
        codec.inner.copy_(self.inner[:, :, kept])
        codec.inner_bias.copy_(self.inner_bias)
        codec.outer.copy_(self.outer)
        codec.outer_bias.copy_(self.outer_bias)


def soft_keys(
    config: KVCapsuleConfig,
    geometry: KVGeometry,
    layer: int,
    initial: torch.Tensor,
    theta: torch.Tensor,
    random: torch.Generator,
) -> SoftKeys:
    """The relaxed form of one layer's keys; random: draws what has no closed form."""
    stored = retained(config.key_ratios[layer], config.tile)
    if config.key_decoder == "mlp":
        return SoftMlp(geometry.kv_heads, config.tile, stored, config.hidden, initial, random)
    return SoftLinear(config.tile, stored, initial, theta)
