"""Layer group study: the gain of coding the keys and values of a group of layers as one source, as cross-layer does.

Parts are the keys and the values of each layer of the group, with the heads of a head group concatenated, as in
kvcapsule.codec.cross_layer. Every part is scaled to unit variance, so the result is the mean of their unexplained
variances: a study cannot measure the effect of a part's errors on attention's output, by which training scales them.
E tiles, S head groups, T tokens per tile, C channels of a source.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcapsule.codec.bit_allocation import bits_for, water_fill
from kvcapsule.codec.coefficient_transform import merge_heads
from kvcapsule.codec.grouping import joint_heads, joint_layers, layer_groups
from kvcapsule.vlm.geometry import KVGeometry, full_attention_layers

from ..harvest import LayerHarvest
from ..second_moments import Moments
from .distortion import BITS, FULL_BITS
from .layer import NAMES, LayerStudy
from .spectrum import TileMoments

_NOTHING = 1e-12
"""Share of a part's energy below which its variance is rounding error and counts as 0."""


class Source:
    """Coding source with given moments: its principal axes, and the variances of the coefficients along them."""

    def __init__(
        self, total_STC: torch.Tensor, tokens_STT: torch.Tensor, channels_SCC: torch.Tensor, count: int
    ) -> None:
        """total, tokens, channels: sums over `count` tiles, as in Moments."""
        moments = Moments(*total_STC.shape).to(total_STC.device)
        moments.total, moments.tokens, moments.channels = total_STC, tokens_STT, channels_SCC
        moments.count += count
        bases = moments.bases()
        self.count, self.mean, self.tokens, self.channels = count, total_STC / count, bases.tokens, bases.channels_in
        self.square = torch.zeros_like(total_STC)

    def add(self, index: int, x_ETC: torch.Tensor) -> None:
        """Add tiles of one head group, in fp64."""
        coefficients = self.tokens[index] @ (x_ETC - self.mean[index]) @ self.channels[index]
        self.square[index] += coefficients.square().sum(0)

    def variances(self) -> torch.Tensor:
        """Unbiased variances of the coefficients, [S, T, C]."""
        return self.square / (self.count - 1)


class LayerGroupStudy:
    """Study of one layer group. Within a batch, the tiles of its layers are held until its last layer has run."""

    def __init__(self, layers: Sequence[int], heads: int) -> None:
        """Begin a study.

        Args:
            layers: indices of the layers, in the order of the forward.
            heads: KV heads per head group.
        """
        self.layers, self.heads = list(layers), heads
        self.pending: list[torch.Tensor] = []
        self._channels: dict[int, torch.Tensor] = {}
        self._studies: list[LayerStudy] = []

    def first(self, tiles: LayerHarvest | None) -> None:
        """Add the next layer's tiles of a batch to the first pass: unscaled second moments along the channels of all
        parts."""
        for index, x_ETC in self._all_parts(tiles):
            rows = x_ETC.flatten(0, 1)
            self._channels[index] = self._channels.get(index, 0) + rows.transpose(0, 1) @ rows

    def solve(self, studies: Sequence[LayerStudy]) -> None:
        """Compute scales and axes between the passes.

        Args:
            studies: the studies of the group's layers after the first pass, in order.
        """
        self._studies = list(studies)
        channels = torch.stack([self._channels.pop(index) for index in sorted(self._channels)])
        parts = [study.tiles[name] for study in studies for name in NAMES]
        self._scales = [_scale(part) for part in parts]
        totals, tokens = [], []
        for scale, part in zip(self._scales, parts, strict=True):
            totals.append(scale * merge_heads(part.moments.total[None].to(channels.device), self.heads)[0])
            tokens.append(scale**2 * part.moments.tokens.to(channels.device).unflatten(0, (-1, self.heads)).sum(1))
        width, count = totals[0].shape[2], parts[0].tiles
        self._scaling = torch.tensor(self._scales, dtype=channels.dtype, device=channels.device).repeat_interleave(
            width
        )
        channels *= self._scaling * self._scaling[:, None]
        self._together = Source(torch.cat(totals, 2), torch.stack(tokens).sum(0), channels, count)
        self._slices = [slice(i * width, (i + 1) * width) for i in range(len(parts))]
        self._separate = []
        if self.heads > 1:
            blocks = [channels[:, part, part] for part in self._slices]
            self._separate = [Source(*sums, count) for sums in zip(totals, tokens, blocks, strict=True)]

    def second(self, tiles: LayerHarvest | None) -> None:
        """Add the same layer's tiles to the second pass."""
        for index, x_ETC in self._all_parts(tiles):
            x = x_ETC * self._scaling
            self._together.add(index, x)
            for source, part in zip(self._separate, self._slices, strict=False):
                source.add(index, x[..., part])

    def predicted(self) -> list[dict[str, Any]]:
        """The group's entries in "stacks" of the JSON object (docs/analyze.md)."""
        together, apart, parts = self._together.variances(), self._separate_variances(), len(self._scales)
        entries = []
        for bits in BITS:
            lost = water_fill(together, bits).distortion
            entries.append(
                {
                    "first": self.layers[0],
                    "last": self.layers[-1],
                    "bits": bits,
                    "compression": FULL_BITS / bits,
                    "apart": min(1.0, water_fill(apart, bits).distortion / parts),
                    "together": min(1.0, lost / parts),
                    "apart_bits": bits_for(apart, lost),
                }
            )
        return entries

    def _separate_variances(self) -> torch.Tensor:
        """Variances of all coefficients, with separate axes for every part."""
        variances = [source.variances() for source in self._separate]
        if not variances:  # With head groups of one head, the layer studies have the axes.
            unscaled = [study.variances(name) for study in self._studies for name in NAMES]
            variances = [scale**2 * x for scale, x in zip(self._scales, unscaled, strict=True)]
        return torch.cat([x.flatten().cpu() for x in variances])

    def _all_parts(self, tiles: LayerHarvest | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Once a batch's last layer is added: index and tiles of each head group, all parts concatenated along the
        channels, [E, T, C] in fp64."""
        if tiles is None:
            return
        self.pending += [merge_heads(x, self.heads) for x in (tiles.keys, tiles.values)]
        if len(self.pending) == 2 * len(self.layers):
            device = self.pending[0].device
            for index in range(self.pending[0].shape[1]):
                yield index, torch.cat([x[:, index].to(device).double() for x in self.pending], 2)
            self.pending = []


def layer_groups_of(model: PreTrainedModel) -> list[LayerGroupStudy]:
    """The default layer groups of `kvcapsule train cross-layer`, over the layers with full attention."""
    geometry, layers = KVGeometry.from_config(model.config), full_attention_layers(model.config)
    heads = joint_heads(geometry.kv_heads, geometry.head_dim)
    runs = layer_groups(len(layers), joint_layers(heads, geometry.head_dim))
    return [LayerGroupStudy(layers[run.start : run.stop], heads) for run in runs]


def _scale(part: TileMoments) -> float:
    """Factor that scales a part's variance to 1; 0 if it is constant."""
    variance, energy = part.variance(), float(part.moments.channels.diagonal(dim1=-2, dim2=-1).sum()) / part.tiles
    return variance**-0.5 if variance > _NOTHING * energy else 0.0
