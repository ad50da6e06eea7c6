"""What it is worth to code the keys and values of a stack of layers as one source, as the family cross-layer does.

Units are the keys and the values of each layer of the stack, sets of KV heads side by side, as in
kvcapsule.codec.cross_layer. Each unit is scaled to unit variance, so that what counts is the mean of their unexplained
variances: a study has no measure of what a unit's errors cost in attention's output, by which training scales them. E
    tiles, S sets, T tokens of a tile, C channels of a source.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcapsule.codec.bit_allocation import bits_for, water_fill
from kvcapsule.codec.transform import merge_heads
from kvcapsule.vlm.geometry import KVGeometry, full_attention_layers

from ..families.grouping import joint_heads, joint_layers, layer_groups
from ..harvest import LayerHarvest
from ..second_moments import Moments
from .distortion import BITS, FULL_BITS
from .layer import NAMES, LayerStudy
from .spectrum import TileMoments

_NOTHING = 1e-12
"""A variance below this share of a unit's energy is what rounding leaves of none."""


class Source:
    """What is coded as one, of given moments: principal axes, and the variances of the coefficients along them."""

    def __init__(
        self, total_STC: torch.Tensor, tokens_STT: torch.Tensor, channels_SCC: torch.Tensor, count: int
    ) -> None:
        """Sums over `count` tiles, as in Moments."""
        moments = Moments(*total_STC.shape).to(total_STC.device)
        moments.total, moments.tokens, moments.channels = total_STC, tokens_STT, channels_SCC
        moments.count += count
        bases = moments.bases()
        self.count, self.mean, self.tokens, self.channels = count, total_STC / count, bases.tokens, bases.channels_in
        self.square = torch.zeros_like(total_STC)

    def add(self, index: int, x_ETC: torch.Tensor) -> None:
        """Add tiles of one set, in fp64."""
        found = self.tokens[index] @ (x_ETC - self.mean[index]) @ self.channels[index]
        self.square[index] += found.square().sum(0)

    def variances(self) -> torch.Tensor:
        """[S, T, C], without the bias of a mean that was measured on the same tiles."""
        return self.square / (self.count - 1)


class StackStudy:
    """One stack. The tiles of its layers are held from its first layer of a batch to its last; those of other stacks
    are not."""

    def __init__(self, layers: Sequence[int], heads: int) -> None:
        """Nothing is seen yet.

        Args:
            layers: their numbers, in the order in which a batch goes through them.
            heads: KV heads of a set.
        """
        self.layers, self.heads = list(layers), heads
        self.held: list[torch.Tensor] = []
        self._channels: dict[int, torch.Tensor] = {}
        self._studies: list[LayerStudy] = []

    def first(self, tiles: LayerHarvest | None) -> None:
        """Add the next layer's tiles of a batch to the first pass: moments along the channels of all units, not yet
        scaled."""
        for index, x_ETC in self._whole(tiles):
            rows = x_ETC.flatten(0, 1)
            self._channels[index] = self._channels.get(index, 0) + rows.transpose(0, 1) @ rows

    def solve(self, studies: Sequence[LayerStudy]) -> None:
        """Between the passes: scales and axes.

        Args:
            studies: those of the stack's layers after their first pass, in order. All else that a stack needs they
                have.
        """
        self._studies = list(studies)
        channels = torch.stack([self._channels.pop(index) for index in sorted(self._channels)])
        units = [study.tiles[name] for study in studies for name in NAMES]
        self._scales = [_scale(unit) for unit in units]
        totals, tokens = [], []
        for scale, unit in zip(self._scales, units, strict=True):
            totals.append(scale * merge_heads(unit.moments.total[None].to(channels.device), self.heads)[0])
            tokens.append(scale**2 * unit.moments.tokens.to(channels.device).unflatten(0, (-1, self.heads)).sum(1))
        width, count = totals[0].shape[2], units[0].tiles
        self._scaling = torch.tensor(self._scales, dtype=channels.dtype, device=channels.device).repeat_interleave(
            width
        )
        channels *= self._scaling * self._scaling[:, None]
        self._together = Source(torch.cat(totals, 2), torch.stack(tokens).sum(0), channels, count)
        self._places = [slice(i * width, (i + 1) * width) for i in range(len(units))]
        self._apart = []
        if self.heads > 1:
            blocks = [channels[:, own, own] for own in self._places]
            self._apart = [Source(*sums, count) for sums in zip(totals, tokens, blocks, strict=True)]

    def second(self, tiles: LayerHarvest | None) -> None:
        """Add the same layer's tiles to the second pass."""
        for index, x_ETC in self._whole(tiles):
            x = x_ETC * self._scaling
            self._together.add(index, x)
            for source, own in zip(self._apart, self._places, strict=False):
                source.add(index, x[..., own])

    def predicted(self) -> list[dict[str, Any]]:
        """The stack's entries under "stacks" (docs/analyze.md)."""
        together, apart, units = self._together.variances(), self._variances_apart(), len(self._scales)
        found = []
        for bits in BITS:
            lost = water_fill(together, bits).distortion
            found.append(
                {
                    "first": self.layers[0],
                    "last": self.layers[-1],
                    "bits": bits,
                    "compression": FULL_BITS / bits,
                    "apart": min(1.0, water_fill(apart, bits).distortion / units),
                    "together": min(1.0, lost / units),
                    "apart_bits": bits_for(apart, lost),
                }
            )
        return found

    def _variances_apart(self) -> torch.Tensor:
        """Of all units' coefficients, each unit in axes of its own."""
        found = [source.variances() for source in self._apart]
        if not found:  # a set of one head has the axes that the layer's study has found
            each = [study.variances(name) for study in self._studies for name in NAMES]
            found = [scale**2 * x for scale, x in zip(self._scales, each, strict=True)]
        return torch.cat([x.flatten().cpu() for x in found])

    def _whole(self, tiles: LayerHarvest | None) -> Iterator[tuple[int, torch.Tensor]]:
        """With a batch's last layer: each set's number and its tiles, all units side by side, [E, T, C] in fp64."""
        if tiles is None:
            return
        self.held += [merge_heads(x, self.heads) for x in (tiles.keys, tiles.values)]
        if len(self.held) == 2 * len(self.layers):
            device = self.held[0].device
            for index in range(self.held[0].shape[1]):
                yield index, torch.cat([x[:, index].to(device).double() for x in self.held], 2)
            self.held = []


def stacks_of(model: PreTrainedModel) -> list[StackStudy]:
    """The stacks that `kvcapsule train cross-layer` forms by default, of the layers with full attention."""
    geometry, layers = KVGeometry.from_config(model.config), full_attention_layers(model.config)
    heads = joint_heads(geometry.kv_heads, geometry.head_dim)
    runs = layer_groups(len(layers), joint_layers(heads, geometry.head_dim))
    return [StackStudy(layers[run.start : run.stop], heads) for run in runs]


def _scale(unit: TileMoments) -> float:
    """What makes a unit's variance 1; 0 where nothing varies."""
    variance, energy = unit.variance(), float(unit.moments.channels.diagonal(dim1=-2, dim2=-1).sum()) / unit.tiles
    return variance**-0.5 if variance > _NOTHING * energy else 0.0
