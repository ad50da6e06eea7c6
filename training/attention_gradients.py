"""Fisher information of the answers' logits with respect to attention's output, one number per query and head.

To second order KL(p || p') of the answers' tokens is e^T F e / 2 for an error e of a layer's attention outputs, with
F = mean over y ~ p of g g^T, g = d log p(y) / d outputs. F is approximated by its diagonal blocks of one query and one
head, and these by a multiple of the identity: |g|^2 / D. It tells layers, heads and queries apart, not directions.

Gradients are taken at the true keys and values.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument

from .datamodule import Batch
from .fisher import sampled_log_likelihood
from .harvest import LayerHarvest, Recorder


class Sensitivity(NamedTuple):
    """One layer's harvest of a batch, and what its errors cost."""

    layer: LayerHarvest
    cost: torch.Tensor
    """[B, H * G, Q]: KL in nats per squared error of a query's output."""


class _ProbedLayer(CapsuleLayer):
    """Cache layer whose outputs behind the last image are the true ones plus a tensor of zeros that takes gradients."""

    def __init__(self, index: int, recorder: Recorder) -> None:
        super().__init__(index, recorder)
        self.recorder = recorder
        self.probe: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return False

    def attend(self, query: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        prefill = self.take_prefill(query, scale)
        detached = {name: getattr(prefill, name).detach() for name in ("query", "keys", "values")}
        self.recorder.compress(replace(prefill, **detached))
        heads = query.shape[1] // prefill.keys.shape[1]
        keys, values = (x.repeat_interleave(heads, dim=1) for x in (prefill.keys, prefill.values))
        exact = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, is_causal=mask is None)
        read = self.recorder.layers[-1].query.shape[2]
        self.probe = torch.zeros_like(exact[:, :, -read:], requires_grad=True)
        return torch.cat([exact[:, :, :-read], exact[:, :, -read:] + self.probe], dim=2)


def sensitivities(
    model: PreTrainedModel, batch: Batch, tile: int, canonical: bool, seeds: Sequence[int]
) -> list[Sensitivity]:
    """Harvest of a batch with the cost of errors, layer by layer.

    Args:
        model: the frozen VLM.
        batch: its inputs.
        tile, canonical: as in the harvest.
        seeds: of the sampled answers, one per row.

    Raises:
        ConfigError: if a layer's gradients are not all numbers, or the logits depend on no layer.
    """
    last = int(batch.answers.max()) + 1
    with torch.enable_grad(), attach(model):
        cache = CapsuleCache(model.config, Recorder(tile, canonical, batch.alignment))
        cache.layers = [
            _ProbedLayer(i, Recorder(tile, canonical, batch.alignment)) if isinstance(layer, CapsuleLayer) else layer
            for i, layer in enumerate(cache.layers)
        ]
        inputs = batch.inputs.to(model.device)
        logits = model(**inputs, **cache_argument(cache), logits_to_keep=last).logits
        probed = [layer for layer in cache.layers if isinstance(layer, _ProbedLayer)]
        probes = [layer.probe for layer in probed if layer.probe is not None]
        slopes = torch.autograd.grad(sampled_log_likelihood(logits, batch.answers, seeds), probes)
    costs = [slope.float().square().mean(-1) / 2 for slope in slopes]
    for layer, cost in zip(probed, costs, strict=True):
        if not bool(cost.isfinite().all()):
            raise ConfigError(
                f"layer {layer.index}: gradients of its attention are NaN or infinite. Run the model in another"
                " precision (--dtype float32 or bfloat16)."
            )
    if not any(bool(cost.any()) for cost in costs):
        raise ConfigError(
            "the answers' logits do not depend on attention behind the images: nothing can be learned from them. Look"
            " at the data's prompts and answers."
        )
    return [Sensitivity(layer.recorder.layers[0], cost) for layer, cost in zip(probed, costs, strict=True)]
