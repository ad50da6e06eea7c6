"""Training of the cross-layer family: the cost of each layer's errors, one basis for a group of layers, then the
Fisher information of the logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.cli.tables import Column, ReportTable
from kvcapsule.codec.coefficient_transform import merge_heads
from kvcapsule.codec.cross_layer import CrossLayerCodec, CrossLayerConfig, CrossLayerTransform
from kvcapsule.segments.segment import Segment

from ..capsule_fit import Task
from ..harvest import LayerHarvest
from ..second_moments import Moments
from .closed_form import Tiles, closed_form, measured, sensitivities, tiles
from .coding_source import CodingSource
from .coefficient_fit import CoefficientFit
from .cross_layer_options import CrossLayerRecipe
from .grouping import joint_layers, layer_groups
from .straight_through import coded

_FIRST = 10
"""Batches that show the variances of a first code, under which the Fisher information is measured."""


class Coordinates(NamedTuple):
    """Linear coordinates of a layer group's parts side by side: y = x into, x = y back^T."""

    into: torch.Tensor
    """[S, W, W]."""
    back: torch.Tensor
    """[S, W, W]."""


class CrossLayerFit(CoefficientFit[CrossLayerRecipe]):
    """Keys and values of a group of layers are one source.

    They are laid side by side in coordinates in which an error of one costs all parts the same: keys under the metric
    of their queries, and each part times the root of what its errors add to attention's output (`sensitivities`).
    Principal axes and reverse water-filling then divide the bits among layers, keys and values by themselves; and once
    more under the Fisher information of the logits over all parts.
    """

    recipe_class = CrossLayerRecipe

    def __init__(self, task: Task[CrossLayerRecipe]) -> None:
        super().__init__(task)
        geometry, wanted = task.geometry, task.recipe.transform.joint_layers
        self.joint = min(task.layers, wanted or joint_layers(self.heads, geometry.head_dim))
        self.groups = layer_groups(task.layers, self.joint)

    def prepare(self) -> None:
        batches, fisher_batches = self.task.recipe.moment_batches, self.options.fisher_batches
        form = closed_form(self, self.heads)
        costs = sensitivities(self, form.sources, self.budget, self.heads)
        self.coordinates = self._coordinates(form.sources, costs)
        moments = self._moments(batches)
        first = min(batches, _FIRST) if fisher_batches else batches
        sources = measured(
            self,
            [m.bases() for m in moments],
            tiles(self, first, "variances of groups of layers", self.sources),
        )
        if fisher_batches:
            self.layers = self._codecs(sources)
            # In these coordinates the metric by attention's output is the identity.
            baseline = [
                torch.eye(m.channels.shape[1], dtype=torch.float64, device=m.channels.device).expand_as(m.channels)
                for m in moments
            ]
            metrics = self.fisher_metrics(baseline, moments)
            bases = [m.bases(metric) for m, metric in zip(moments, metrics, strict=True)]
            sources = measured(self, bases, tiles(self, batches, "variances under the Fisher metric", self.sources))
        self.layers = self._codecs(sources, form.queries)

    def codec_config(self) -> CrossLayerConfig:
        transforms, task = [self.codec(i).transform for i in range(len(self.layers))], self.task
        coded_bytes = sum(int(t.widths.long().sum()) for t in transforms)
        return CrossLayerConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            joint_layers=self.joint,
            joint_heads=self.heads,
            rows=tuple(t.tokens_in.shape[1] for t in transforms),
            channels=tuple(t.channels_in.shape[3] for t in transforms),
            readers=self.options.query_bank,
            bits=round(coded_bytes * 8 / self.budget.elements(2 * task.layers), 4),
        )

    def codec(self, index: int) -> CrossLayerCodec:
        codec = self.layers[index]
        assert isinstance(codec, CrossLayerCodec)
        return codec

    def segments(self, layers: Sequence[LayerHarvest]) -> list[Segment]:
        segments: list[Segment] = []
        for index, group in enumerate(self.groups):
            transform, bank = self.codec(index).transform, self.codec(index).readers
            sums = torch.stack(
                [transform.across(p, layers[i].keys.float(), layers[i].values.float()) for p, i in enumerate(group)]
            ).sum(0)
            weights = None
            if bank is not None:
                weights = torch.stack([bank(layers[i].keys.float(), p) for p, i in enumerate(group)]).mean(0)
            rows = coded(transform, transform.coefficients(sums), weights)
            segments += [
                transform.encoded(place, rows).segment(layers[i].owner, layers[i].frame)
                for place, i in enumerate(group)
            ]
        return segments

    def derived(self) -> ReportTable:
        transforms, config = [self.codec(i).transform for i in range(len(self.layers))], self.codec_config()
        maps = sum(t.decoder_bytes() for t in transforms) / 2**20
        table = ReportTable(
            [*map(Column, ("layers", "bits", "rows x channels", "coded cells"))],
            title=(
                f"{self.task.recipe.model}: tiles of {self.task.tile} visual tokens, {config.bits:.3f} bit an element, "
                f"{maps:.1f} MiB of maps stored once"
            ),
        )
        for group, t in zip(self.groups, transforms, strict=True):
            bits = int(t.widths.long().sum()) * 8 / self.budget.elements(2 * len(group))
            cells = f"{int((t.widths > 0).sum()):,} of {t.widths.numel():,}"
            layers = self.task.geometry.capsule_layers
            table.add(
                f"{layers[group[0]]} to {layers[group[-1]]}",
                f"{bits:.2f}",
                f"{t.tokens_in.shape[1]} x {t.channels_in.shape[3]}",
                cells,
            )
        return table

    def _coordinates(self, sources: Sequence[CodingSource], costs: list[torch.Tensor]) -> list[Coordinates]:
        """Of each group: in which an error of one costs attention's output the same in all its parts.

        Args:
            sources: the keys and the values of each layer in turn.
            costs: their `sensitivities`.
        """
        # Numbers keep the size that they had, for which learning rates are made.
        mean_cost = torch.stack(costs).mean().clamp_min(1e-12)
        roots = [
            (c / mean_cost).clamp_min(1e-12).sqrt()[:, None, None].to(s.bases.channels_in)
            for s, c in zip(sources, costs, strict=True)
        ]
        into = [source.bases.channels_in * root for source, root in zip(sources, roots, strict=True)]
        back = [source.bases.channels_out / root for source, root in zip(sources, roots, strict=True)]

        def blocks(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([torch.block_diag(*heads) for heads in zip(*parts, strict=True)])

        parts = [slice(2 * group[0], 2 * group[-1] + 2) for group in self.groups]
        return [Coordinates(blocks(into[part]), blocks(back[part])) for part in parts]

    def _moments(self, batches: int) -> list[Moments]:
        moments = [Moments(len(c.into), self.task.tile, c.into.shape[1]).to(c.into.device) for c in self.coordinates]
        for number, x in tiles(self, batches, "moments of groups of layers", self.sources):
            moments[number].add(x)
        for sums in moments:
            self.reduce(sums)
        return moments

    def sources(self, layers: Sequence[LayerHarvest], gradients: bool = False) -> Tiles:
        return group_sources(layers, self.groups, self.coordinates, self.heads, gradients)

    def _codecs(self, sources: Sequence[CodingSource], queries: Sequence[torch.Tensor] = ()) -> nn.ModuleList:
        """The groups' codecs: each cell of each group has the bits that it is worth.

        queries: those of each layer's query bank, none for codecs without one.
        """
        code_bytes = self.budget.code_bytes(2 * self.task.layers)
        widths = self.budget.allocate([source.cells for source in sources], code_bytes)
        limits = self.budget.channel_limits(widths)
        parts = zip(sources, widths, limits, self.coordinates, self.groups, strict=True)
        return nn.ModuleList(
            CrossLayerCodec(
                self._transform(source, w, most, basis, len(group)), self.query_bank(queries[group.start : group.stop])
            )
            for source, w, most, basis, group in parts
        )

    def _transform(
        self, source: CodingSource, widths: torch.Tensor, most: int | None, basis: Coordinates, layers: int
    ) -> CrossLayerTransform:
        held = source.held(widths, most)
        channels = held.channels
        built = CrossLayerTransform(
            layers=layers,
            head_groups=len(widths),
            heads=self.heads,
            tile=self.task.tile,
            dim=self.task.geometry.head_dim,
            rows=held.rows,
            channels=channels,
        ).to(source.variance.device)
        source.fill(built, widths, held)
        with torch.no_grad():
            for axes, parts in (
                (basis.into @ held.bases.channels_in, built.channels_in),
                (basis.back @ held.bases.channels_out, built.channels_out),
            ):
                parts.copy_(axes[:, :, :channels].unflatten(1, (2 * layers, -1)).transpose(0, 1))
        return built


def group_sources(
    layers: Sequence[LayerHarvest],
    groups: Sequence[range],
    coordinates: Sequence[Coordinates],
    heads: int,
    gradients: bool = False,
) -> Tiles:
    """Number and tiles [E, S, T, W] of each layer group in its coordinates, one after another, to hold one.

    Args:
        layers: the harvest of all layers, or gradients in place of its keys and values.
        groups: layers of each group.
        coordinates: of each group.
        heads: KV heads of a set.
        gradients: whether the layers hold gradients, which the coordinates map by their inverse transpose.
    """
    for number, (group, basis) in enumerate(zip(groups, coordinates, strict=True)):
        parts = [merge_heads(x.double(), heads) for i in group for x in (layers[i].keys, layers[i].values)]
        yield number, torch.cat(parts, dim=3) @ (basis.back if gradients else basis.into)
