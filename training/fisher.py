"""Fisher information of the answer logits with respect to keys and values, as one matrix along channels per coding
source.

To second order KL(p || p') of a token's logits is e^T F e / 2 for an error e of the keys and values that it read, with

    F = mean over y ~ p of g g^T,      g = d log p(y) / d (keys, values)

F is approximated by one matrix over the channels of a source (the keys or values of a layer, or all of a layer group),
the same for all tokens, as in Kronecker-factored approximations (K-FAC, arXiv 1503.05671). Unlike the error of one
layer's attention output, it includes the effect of later layers, and errors of several layers that add up or cancel.

Gradients are taken at the keys and values decoded from a first code, not at the true ones: a code of few bits moves
logits beyond the quadratic regime, and a model that reads true keys is more certain of answers than one that reads
coded keys.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from kvcapsule.errors import ConfigError
from kvcapsule.segments.segment import Segment

from .datamodule import Batch
from .frozen_forward import answer_mask, logits_through
from .harvest import LayerHarvest
from .second_moments import Moments

MIX = 0.1
"""Weight of the attention-output metric added to the Fisher metric (both normalised). Few batches miss directions, and
large errors leave the quadratic regime."""


class FisherSums(nn.Module):
    """Sums of g g^T over tiles, tokens and predictions, [S, W, W]; buffers of several ranks can be added."""

    total: torch.Tensor

    def __init__(self, head_groups: int, width: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(head_groups, width, width, dtype=torch.float64))

    def add(self, g_ESTW: torch.Tensor) -> None:
        g = g_ESTW.double()
        self.total += torch.einsum("estw,estv->swv", g, g)


def gradients(
    model: PreTrainedModel,
    batch: Batch,
    tile: int,
    canonical: bool,
    layers: Sequence[LayerHarvest],
    read: Sequence[Segment],
    seeds: list[int],
) -> list[LayerHarvest]:
    """Harvests with gradients in place of keys and values: of log p(y), summed over the predictions of the answer
    tokens, with y sampled from p.

    Args:
        model: the frozen VLM.
        batch: its inputs.
        tile, canonical: as in the harvest.
        layers: the harvest of the batch.
        read: each layer's decoded tiles, where the gradients are taken.
        seeds: seed of the samples per row, so that they do not depend on the batch that a row is in.
    """
    leaves = []
    for segment in read:
        # Without the frame: tiles stay in their canonical frames, as in the harvest.
        keys, values = replace(segment, frame=None).materialize(torch.float32)
        leaves.append((keys.detach().requires_grad_(), values.detach().requires_grad_()))
    last = int(batch.answers.max()) + 1
    tiles = [Segment(k, v, layer.owner, frame=layer.frame) for (k, v), layer in zip(leaves, layers, strict=True)]
    with torch.enable_grad():
        logits = logits_through(model, batch.inputs, tile, canonical, tiles, last, batch.alignment)
        likelihood = sampled_log_likelihood(logits, batch.answers, seeds)
        slopes = torch.autograd.grad(likelihood, [leaf for pair in leaves for leaf in pair])
    return [replace(layer, keys=k, values=v) for layer, k, v in zip(layers, slopes[::2], slopes[1::2], strict=True)]


def sampled_log_likelihood(logits: torch.Tensor, answers: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Sum of log p(y) over the predictions of the answers' tokens, with y drawn from p.

    Args:
        logits: [B, last, vocabulary] of the last tokens.
        answers: [B], number of answer tokens at the end of each row.
        seeds: of the samples, one per row.
    """
    log_p = logits[answer_mask(answers.to(logits.device), logits.shape[1])].float().log_softmax(-1)
    drawn = [
        torch.rand(int(n), generator=torch.Generator().manual_seed(s)) for n, s in zip(answers, seeds, strict=True)
    ]
    quantiles = torch.cat(drawn).to(log_p)[:, None]
    chosen = torch.searchsorted(log_p.detach().exp().cumsum(-1), quantiles).clamp_max(log_p.shape[-1] - 1)
    return log_p.gather(1, chosen).sum()


def require_finite_gradients(slopes: Sequence[LayerHarvest], indices: Sequence[int]) -> None:
    """Raises ConfigError that names the first layer whose gradients are not all numbers; indices: of the layers in the
    model."""
    for i, layer in zip(indices, slopes, strict=True):
        if not bool(layer.keys.isfinite().all() and layer.values.isfinite().all()):
            raise ConfigError(
                f"layer {i}: gradients of its keys or values are NaN or infinite. Run the model in another precision"
                " (--dtype float32 or bfloat16), or leave the logits out with --transform.logit_batches 0."
            )


def mixed(
    fisher: Sequence[FisherSums], baseline: Sequence[torch.Tensor], moments: Sequence[Moments]
) -> list[torch.Tensor]:
    """Metrics [S, W, W] of sources: the Fisher information, scaled to the size of the baseline metric (by attention's
    output), plus MIX of that.

    Raises:
        ConfigError: if the logits do not depend on what is coded.
    """
    spreads = [moment.spread() for moment in moments]
    measured, wanted = (
        torch.stack([(metric * spread).sum() for metric, spread in zip(metrics, spreads, strict=True)]).sum()
        for metrics in ([sums.total for sums in fisher], baseline)
    )
    if not measured > 0:
        raise ConfigError(
            "the answers' logits do not depend on the visual tokens: nothing can be learned from them. Look at the"
            " data's prompts and answers, or leave the logits out with --transform.logit_batches 0."
        )
    return [sums.total * (wanted / measured) + MIX * metric for sums, metric in zip(fisher, baseline, strict=True)]
