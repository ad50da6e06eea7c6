"""Training of the cross-layer family: the cost of each layer's errors, one basis for a group of layers, then the
Fisher information of the logits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.cli.tables import Column, ReportTable
from kvcapsule.codec.coefficient_transform import merge_heads
from kvcapsule.codec.cross_layer import CrossLayerCodec, CrossLayerConfig, CrossLayerTransform
from kvcapsule.codec.grouping import joint_layers, layer_groups
from kvcapsule.errors import ConfigError
from kvcapsule.segments.map_products import times_map
from kvcapsule.segments.segment import Segment

from ..fisher import Mixture
from ..harvest import LayerHarvest
from ..joint_moments import JointMoments
from ..second_moments import Moments
from ..task import Task
from ..tile_sample import LayerTiles
from .closed_form import Tiles, closed_form, measured, sensitivities
from .coding_source import CodingSource
from .coefficient_fit import CoefficientFit
from .cross_layer_options import CrossLayerRecipe
from .straight_through import coded


class Coordinates(NamedTuple):
    """Linear coordinates of each part of a layer group: y = x into, x = y back^T."""

    into: torch.Tensor
    """[P, S, W, W]."""
    back: torch.Tensor
    """[P, S, W, W]."""


class CrossLayerFit(CoefficientFit[CrossLayerRecipe]):
    """Keys and values of a group of layers are one source.

    They are laid side by side in coordinates in which an error of one costs all parts the same: keys under the metric
    of their queries, and each part times the root of what its errors add to attention's output (`sensitivities`).
    Principal axes and reverse water-filling then divide the bits among layers, keys and values by themselves; and once
    more under the Fisher information of the logits over all parts.
    """

    recipe_class = CrossLayerRecipe
    together = True

    def __init__(self, task: Task[CrossLayerRecipe]) -> None:
        super().__init__(task)
        geometry, wanted = task.geometry, task.recipe.transform.joint_layers
        self.joint = min(task.layers, wanted or joint_layers(self.heads, geometry.head_dim))

    @property
    def groups(self) -> Sequence[range]:
        return layer_groups(self.task.layers, self.joint)

    def _require_one_device(self) -> None:
        """Raises ConfigError if layers that are coded together lie on several devices."""
        for group in self.groups:
            first, *others = (self.devices[i] for i in group)
            if any(device != first for device in others):
                layers = [self.task.geometry.capsule_layers[i] for i in group]
                raise ConfigError(
                    f"layers {layers[0]} to {layers[-1]} are coded together and lie on several devices: give another"
                    " --transform.joint-layers, or train the transform family, which codes every layer by itself."
                )

    def prepare(self) -> None:
        self._require_one_device()
        form = closed_form(self, self.heads, self.together)
        costs = sensitivities(self, form.sources, self.budget, self.heads)
        self.coordinates = self._coordinates(form.sources, costs)
        moments = self._moments(form.joint)
        numbers = range(len(self.groups))
        bases = [moments(n).bases().single() for n in numbers]
        sources = measured(self, bases, self.all_sources("variances of groups of layers"))
        if self.options.fisher_batches:
            self.layers = self._codecs(sources)
            # Let go before the next ones are solved.
            del bases, sources
            sources = self._second_code(moments)
        self.layers = self._codecs(sources, form.queries)

    def _second_code(self, moments: Callable[[int], Moments]) -> list[CodingSource]:
        """Sources in the bases of the Fisher information under the present layers' code; moments: of a group's parts in
        their coordinates."""
        fisher = self.fisher_sums([(c.into.shape[1], len(c.into) * c.into.shape[2]) for c in self.coordinates])
        self.layers = nn.ModuleList()

        def identity(of: torch.Tensor) -> torch.Tensor:
            # In these coordinates, the metric by attention's output.
            return torch.eye(of.shape[1]).to(of).expand_as(of)

        mixture = Mixture((f.total, identity(f.total), moments(n).spread()) for n, f in enumerate(fisher))
        bases = []
        for number, of_group in enumerate(fisher):
            metric = mixture.metric(of_group.total, identity(of_group.total))
            of_group.total = torch.empty(0)
            bases.append(moments(number).bases(metric).single())
        return measured(self, bases, self.all_sources("variances under the Fisher metric"))

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

        parts = [slice(2 * group[0], 2 * group[-1] + 2) for group in self.groups]
        return [Coordinates(torch.stack(into[part]), torch.stack(back[part])) for part in parts]

    def _moments(self, joint: Sequence[JointMoments]) -> Callable[[int], Moments]:
        """The moments of a group's parts in their coordinates, given its number; made anew at every call."""
        tile = self.task.tile
        along = [_AlongTokens(len(c.into[0]), tile).to(c.into.device) for c in self.coordinates]
        self.all_sources("moments of groups of layers")(lambda number, x: along[number].add(x))
        for sums in along:
            self.reduce(sums)

        def of(number: int) -> Moments:
            # Of a sample, as if of all tiles.
            tokens = along[number].tokens * (joint[number].count / along[number].count)
            return joint[number].mapped(self.coordinates[number].into, tokens)

        return of

    def sources(self, number: int, layers: Sequence[LayerTiles], gradients: bool = False) -> Tiles:
        basis = self.coordinates[number]
        maps = basis.back if gradients else basis.into
        parts = [merge_heads(x.float(), self.heads) for layer in layers for x in layer]
        yield number, torch.cat([times_map(x, into) for x, into in zip(parts, maps, strict=True)], dim=3)

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
            for maps, axes, parts in (
                (basis.into, held.bases.channels_in, built.channels_in),
                (basis.back, held.bases.channels_out, built.channels_out),
            ):
                parts.copy_(maps @ axes[:, :, :channels].unflatten(1, (2 * layers, -1)).transpose(0, 1))
        return built


class _AlongTokens(nn.Module):
    """Sums of X X^T over tiles X of T tokens; buffers of several ranks can be added."""

    tokens: torch.Tensor
    count: torch.Tensor

    def __init__(self, head_groups: int, tile: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(head_groups, tile, tile, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, x_ESTW: torch.Tensor) -> None:
        for group, total in enumerate(self.tokens):
            rows = x_ESTW[:, group].double().transpose(0, 1).flatten(1)
            total.addmm_(rows, rows.transpose(0, 1))
        self.count += len(x_ESTW)
