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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from kvcapsule.errors import ConfigError
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.segment import Segment

from .frozen_forward import answer_mask
from .question_forward import Reading
from .tile_sample import LayerTiles

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
        """Take in gradients. One head group's are held in fp64 at a time: in what order they are summed, and so in how
        many processes, is not to be seen in bases of nearly equal weight."""
        for group, total in enumerate(self.total):
            g = g_ESTW[:, group].double().flatten(0, 1)
            total.addmm_(g.transpose(0, 1), g)


Sink = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Takes the number of a layer and the gradients at its tiles' keys and values, [E, H, T, D] each."""
Forward = Callable[[Sequence[Reading], int], torch.Tensor]
"""Logits [B, last, vocabulary] of a batch that reads as each layer's reading says; last: tokens."""


class FeltReading:
    """Queries that read decoded tiles, of which nothing is kept: they are decoded anew on the way back, and the
    gradients at their keys and values are handed on there and then."""

    def __init__(self, number: int, tiles: Segment, sink: Sink) -> None:
        """number: of the layer. tiles: decoded where the gradients are taken."""
        self.number, self.tiles, self.sink = number, tiles, sink

    def read(self, query: torch.Tensor, rest: Segment, visible: torch.Tensor, scale: float) -> torch.Tensor:
        # In the first layer nothing else asks for gradients.
        asks = torch.zeros((), device=query.device, requires_grad=True)
        around = _Around(self, rest, visible, scale)
        out: torch.Tensor = _FeltAttention.apply(asks, query, rest.keys, rest.values, around)  # type: ignore[no-untyped-call]
        return out


class _Around(NamedTuple):
    reading: FeltReading
    rest: Segment
    visible: torch.Tensor
    scale: float

    def out(
        self, query: torch.Tensor, rest: tuple[torch.Tensor, torch.Tensor], tiles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        coded, others = self.reading.tiles, self.rest
        read = [Segment(*tiles, coded.owner, frame=coded.frame), Segment(*rest, others.owner, mask=others.mask)]
        return attend(query, read, self.scale, self.visible)

    def tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Without the frame: tiles stay in their canonical frames, as in the harvest.
        with torch.no_grad():
            return replace(self.reading.tiles, frame=None).materialize(torch.float32)


class _FeltAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asks: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, around: _Around
    ) -> torch.Tensor:
        ctx.around = around
        ctx.save_for_backward(query, keys, values)
        return around.out(query, (keys, values), around.tiles())

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in (*ctx.saved_tensors, *ctx.around.tiles())]
        with torch.enable_grad():
            query, keys, values, *tiles = leaves
            out = ctx.around.out(query, (keys, values), (tiles[0], tiles[1]))
            gradients = torch.autograd.grad(out, leaves, slopes[0])
        ctx.around.reading.sink(ctx.around.reading.number, *gradients[3:])
        return None, *gradients[:3], None


def each_gradient(
    forward: Forward, read: Sequence[Segment], answers: torch.Tensor, seeds: list[int], sink: Sink
) -> None:
    """Hand the gradients at each layer's tiles on, from the last layer to the first: those of log p(y), summed over the
    predictions of the answer tokens, with y sampled from p.

    Args:
        forward: of the batch.
        read: each layer's coded tiles, decoded where the gradients are taken.
        answers: of the batch.
        seeds: of the samples, one for each row, so that they do not depend on the batch that a row is in.
        sink: takes them.
    """
    readings = [FeltReading(number, tiles, sink) for number, tiles in enumerate(read)]
    with torch.enable_grad():
        logits = forward(readings, int(answers.max()) + 1)
        sampled_log_likelihood(logits, answers, seeds).backward()


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


def require_finite_gradients(number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raises ConfigError that names the layer if its gradients are not all numbers."""
    if not bool(keys.isfinite().all() and values.isfinite().all()):
        raise ConfigError(
            f"layer {number}: gradients of its keys or values are NaN or infinite. Run the model in another precision"
            " (--dtype float32 or bfloat16), or leave the logits out with --transform.logit_batches 0."
        )


class GradientSink:
    """Gathers the gradients of a layer group, whose layers come one by one, the last one first."""

    def __init__(
        self, groups: Sequence[range], indices: Sequence[int], done: Callable[[int, list[LayerTiles]], None]
    ) -> None:
        """indices: of the groups' layers in the model. done: takes the number of a group and the gradients in place of
        its layers' keys and values."""
        self.groups, self.indices, self.done = groups, indices, done
        self._number = {layer: number for number, group in enumerate(groups) for layer in group}
        self._waiting: dict[int, LayerTiles] = {}

    def take(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raises ConfigError if they are not all numbers."""
        require_finite_gradients(self.indices[layer], keys, values)
        self._waiting[layer] = LayerTiles(keys, values)
        number = self._number[layer]
        if all(i in self._waiting for i in self.groups[number]):
            self.done(number, [self._waiting.pop(i) for i in self.groups[number]])


class Mixture:
    """Metrics [S, W, W] of sources: the Fisher information, scaled to the size of a baseline metric (by attention's
    output), plus MIX of that."""

    def __init__(self, costs: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """costs: of each source its Fisher information, its baseline metric and the spread of its tiles.

        Raises:
            ConfigError: if the logits do not depend on what is coded.
        """
        measured = wanted = 0.0
        for fisher, baseline, spread in costs:
            measured += float((fisher * spread).sum())
            wanted += float((baseline * spread).sum())
        if not measured > 0:
            raise ConfigError(
                "the answers' logits do not depend on the visual tokens: nothing can be learned from them. Look at the"
                " data's prompts and answers, or leave the logits out with --transform.logit_batches 0."
            )
        self.scale = wanted / measured

    def metric(self, fisher: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
        return fisher * self.scale + MIX * baseline
