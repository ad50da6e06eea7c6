"""Training of the cross-layer family: what each layer's errors cost, one basis for a stack of layers, then what the
logits feel."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch import nn

from kvcapsule.codec.cross_layer import CrossLayerCodec, CrossLayerConfig, CrossLayerTransform
from kvcapsule.codec.transform import side_by_side
from kvcapsule.segments.segment import Segment

from ..capsule_fit import Task
from ..harvest import LayerHarvest
from .coding_source import Unit, used
from .grouping import joint_layers, stacks
from .spectra import Moments
from .straight_through import coded
from .transform import TransformFit

_FIRST = 10
"""Batches that show the variances of a first code, which is only where what the logits feel is measured."""


class Coordinates(NamedTuple):
    """Linear coordinates of a stack's parts side by side: y = x into, x = y back^T."""

    into: torch.Tensor
    """[S, W, W]."""
    back: torch.Tensor
    """[S, W, W]."""


class CrossLayerFit(TransformFit):
    """As a transform code's, but that keys and values of a stack are one source.

    They are laid side by side in coordinates in which an error of one costs all parts the same: keys under the metric
    of their queries, and each part times the root of what its errors add to attention's output (`sensitivities`).
    Principal axes and reverse water-filling then share out the bits among layers, keys and values by themselves; and
    once more in the metric of the logits over all parts.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        geometry, recipe = task.geometry, task.recipe.transform
        if recipe.allocation != "output" or recipe.key_bits is not None:
            raise ValueError(
                "a cross-layer code shares its bits out by what they save in attention's output: leave"
                " --transform.allocation, --transform.key_bits and --transform.value_bits out, or train the transform"
                " family."
            )
        self.joint = min(geometry.layers, recipe.joint_layers or joint_layers(self.heads, geometry.head_dim))
        self.stacks = stacks(geometry.layers, self.joint)

    def prepare(self) -> None:
        batches = self.task.recipe.moment_batches
        alone = self._units(batches)
        self.coordinates = self._coordinates(alone, self.sensitivities(alone))
        moments = self._moments(batches)
        first = batches if not self.recipe.felt_batches else min(batches, _FIRST)
        units = self.measured(
            [own.bases() for own in moments], self.tiles(first, "variances of stacks of layers", self.sources)
        )
        if self.recipe.felt_batches:
            self.layers = self._codecs(units, readers=False)
            # In these coordinates the metric by attention's output is one.
            usual = [
                torch.eye(m.channels.shape[1], dtype=torch.float64, device=m.channels.device).expand_as(m.channels)
                for m in moments
            ]
            bases = [own.bases(metric) for own, metric in zip(moments, self.felt(usual, moments), strict=True)]
            units = self.measured(bases, self.tiles(batches, "variances of what the logits feel", self.sources))
        self.layers = self._codecs(units, readers=True)

    def codec_config(self) -> CrossLayerConfig:
        transforms, task = [self._of(stack) for stack in range(len(self.layers))], self.task
        coded_bytes = sum(int(t.widths.long().sum()) for t in transforms)
        return CrossLayerConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            joint_layers=self.joint,
            joint_heads=self.heads,
            rows=tuple(t.tokens_in.shape[1] for t in transforms),
            channels=tuple(t.channels_in.shape[3] for t in transforms),
            readers=self.recipe.readers,
            bits=round(coded_bytes * 8 / self._elements(2 * task.geometry.layers), 4),
        )

    def codec(self, index: int) -> CrossLayerCodec:
        codec = self.layers[index]
        assert isinstance(codec, CrossLayerCodec)
        return codec

    def segments(self, layers: Sequence[LayerHarvest]) -> list[Segment]:
        found: list[Segment] = []
        for index, stack in enumerate(self.stacks):
            transform, readers = self._of(index), self.codec(index).readers
            sums = torch.stack(
                [transform.across(p, layers[i].keys.float(), layers[i].values.float()) for p, i in enumerate(stack)]
            ).sum(0)
            weights = None
            if readers is not None:
                weights = torch.stack([readers(layers[i].keys.float(), p) for p, i in enumerate(stack)]).mean(0)
            rows = coded(transform, transform.coefficients(sums), weights)
            found += [
                transform.encoded(place, rows).segment(layers[i].owner, layers[i].frame)
                for place, i in enumerate(stack)
            ]
        return found

    def derived(self) -> Table:
        transforms, config = [self._of(stack) for stack in range(len(self.layers))], self.codec_config()
        maps = sum(t.decoder_bytes() for t in transforms) / 2**20
        table = Table(
            title=(
                f"{self.task.recipe.model}: tiles of {self.task.tile} visual tokens, {config.bits:.3f} bit an element, "
                f"{maps:.1f} MiB of maps stored once"
            )
        )
        for column in ("layers", "bits", "rows x channels", "coded cells"):
            table.add_column(column, justify="right")
        for stack, t in zip(self.stacks, transforms, strict=True):
            bits = int(t.widths.long().sum()) * 8 / self._elements(2 * len(stack))
            cells = f"{int((t.widths > 0).sum()):,} of {t.widths.numel():,}"
            table.add_row(
                f"{stack[0]} to {stack[-1]}", f"{bits:.2f}", f"{t.tokens_in.shape[1]} x {t.channels_in.shape[3]}", cells
            )
        return table

    def _of(self, stack: int) -> CrossLayerTransform:
        return self.codec(stack).transform

    def _coordinates(self, units: list[Unit], costs: list[torch.Tensor]) -> list[Coordinates]:
        """Of each stack: in which an error of one costs attention's output the same in all its parts."""
        # Numbers keep the size that they had, for which rates of learning are made.
        usual = torch.stack(costs).mean().clamp_min(1e-12)
        roots = [
            (c / usual).clamp_min(1e-12).sqrt()[:, None, None].to(u.bases.channels_in)
            for u, c in zip(units, costs, strict=True)
        ]
        into = [unit.bases.channels_in * root for unit, root in zip(units, roots, strict=True)]
        back = [unit.bases.channels_out / root for unit, root in zip(units, roots, strict=True)]

        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([torch.block_diag(*own) for own in zip(*parts, strict=True)])

        parts = [slice(2 * stack[0], 2 * stack[-1] + 2) for stack in self.stacks]
        return [Coordinates(joined(into[own]), joined(back[own])) for own in parts]

    def _moments(self, batches: int) -> list[Moments]:
        moments = [Moments(len(c.into), self.task.tile, c.into.shape[1]).to(c.into.device) for c in self.coordinates]
        for stack, x in self.tiles(batches, "moments of stacks of layers", self.sources):
            moments[stack].add(x)
        for sums in moments:
            self.reduce(sums)
        return moments

    def sources(self, layers: Sequence[LayerHarvest], gradients: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """The stacks, one after another, to hold one."""
        for number, (stack, own) in enumerate(zip(self.stacks, self.coordinates, strict=True)):
            parts = [side_by_side(x.double(), self.heads) for i in stack for x in (layers[i].keys, layers[i].values)]
            yield number, torch.cat(parts, dim=3) @ (own.back if gradients else own.into)

    def _codecs(self, units: list[Unit], readers: bool) -> nn.ModuleList:
        """The stacks' codecs: each cell of each stack has the bits that it is worth."""
        widths = self.allocated([unit.cells for unit in units], self.budget(2 * self.task.geometry.layers))
        parts = zip(units, widths, self.coordinates, self.stacks, strict=True)
        return nn.ModuleList(
            CrossLayerCodec(self._transform(unit, w, own, len(stack)), self.readers(stack) if readers else None)
            for unit, w, own, stack in parts
        )

    def _transform(self, unit: Unit, widths: torch.Tensor, own: Coordinates, layers: int) -> CrossLayerTransform:
        rows, channels = used(widths)
        sizes = (self.task.tile, self.task.geometry.head_dim, rows, channels)
        built = CrossLayerTransform(layers, len(widths), self.heads, *sizes).to(unit.variance.device)
        unit.fill(built, widths)
        with torch.no_grad():
            for axes, parts in (
                (own.into @ unit.bases.channels_in, built.channels_in),
                (own.back @ unit.bases.channels_out, built.channels_out),
            ):
                parts.copy_(axes[:, :, :channels].unflatten(1, (2 * layers, -1)).transpose(0, 1))
        return built
