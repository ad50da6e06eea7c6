"""Training of the transform family: bases and widths in closed form, twice; then, if asked, gradient descent through
the quantiser."""

from collections.abc import Sequence

import torch
from torch import nn

from kvcapsule.cli.tables import Column, ReportTable
from kvcapsule.codec.coefficient_transform import merge_heads
from kvcapsule.codec.transform import Transform, TransformConfig, TransformLayer
from kvcapsule.methods.ratios import pyramid
from kvcapsule.segments.segment import Segment

from ..fisher import Mixture
from ..harvest import LayerHarvest
from ..tile_sample import LayerTiles
from .closed_form import (
    ClosedForm,
    Tiles,
    closed_form,
    measured,
    read_back,
    sensitivities,
    transform_layers,
)
from .coding_source import CodingSource
from .coefficient_fit import CoefficientFit
from .transform_options import TransformRecipe


class TransformFit(CoefficientFit[TransformRecipe]):
    """A first code is solved from second moments and shares its bits out by attention's output; a second one by the
    Fisher information of the logits where the first leaves keys and values. A source is the keys or the values of a
    layer."""

    recipe_class = TransformRecipe

    def prepare(self) -> None:
        options, form = self.task.recipe.transform, closed_form(self, self.heads, self.together)
        sources = form.sources
        if options.allocation != "output":
            widths = self._widths_by_rule(sources)
        else:
            costs = sensitivities(self, sources, self.budget, self.heads)
            mean_cost = torch.stack(costs).mean().clamp_min(1e-12)
            relative = [(cost / mean_cost)[:, None, None] for cost in costs]
            widths = self._widths([s.cells * cost.to(s.cells) for s, cost in zip(sources, relative, strict=True)])
            if options.fisher_batches:
                self.layers = self._code(sources, widths)
                sources = self._second_code(form, relative)
                widths = self._widths([source.cells for source in sources])
        self.layers = self._code(sources, widths, form.queries)

    def require_budget(self) -> None:
        # Budgets of their own are in place of the compression.
        if self.task.recipe.transform.key_bits is None:
            super().require_budget()

    def sources(self, number: int, layers: Sequence[LayerTiles], gradients: bool = False) -> Tiles:
        for part, x in enumerate(layers[0]):
            yield 2 * number + part, merge_heads(x.float(), self.heads)

    def codec_config(self) -> TransformConfig:
        task, transforms = self.task, [self._transforms(i) for i in range(len(self.layers))]
        rows = [[t.tokens_in.shape[1] for t in pair] for pair in transforms]
        channels = [[t.channels_in.shape[2] for t in pair] for pair in transforms]
        coded_bytes = sum(_bytes(t) for pair in transforms for t in pair)
        return TransformConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            key_rows=tuple(k for k, _ in rows),
            key_channels=tuple(k for k, _ in channels),
            value_rows=tuple(v for _, v in rows),
            value_channels=tuple(v for _, v in channels),
            joint_heads=self.heads,
            readers=self.options.query_bank,
            bits=round(coded_bytes * 8 / self.budget.elements(2 * len(transforms)), 4),
        )

    def codec(self, index: int) -> TransformLayer:
        codec = self.layers[index]
        assert isinstance(codec, TransformLayer)
        return codec

    def segments(self, layers: Sequence[LayerHarvest]) -> list[Segment]:
        return [read_back(self.codec(i), layer) for i, layer in enumerate(layers)]

    def derived(self) -> ReportTable:
        task = self.task
        maps = sum(t.decoder_bytes() for i in range(len(self.layers)) for t in self._transforms(i)) / 2**20
        table = ReportTable(
            [*map(Column, ("layer", "key bits", "value bits", "key rows\nx channels", "value rows\nx channels"))],
            title=(
                f"{task.recipe.model}: tiles of {task.tile} visual tokens, {self.codec_config().bits:.3f} bit an"
                f" element, {maps:.1f} MiB of maps stored once"
            ),
        )
        for i, layer in enumerate(task.geometry.capsule_layers):
            pair = self._transforms(i)
            bits = (f"{_bytes(t) * 8 / self.budget.elements(1):.2f}" for t in pair)
            table.add(str(layer), *bits, *(f"{t.tokens_in.shape[1]} x {t.channels_in.shape[2]}" for t in pair))
        return table

    def _transforms(self, layer: int) -> tuple[Transform, Transform]:
        codec = self.codec(layer)
        return codec.keys.transform, codec.values.transform

    def _second_code(self, form: ClosedForm, relative: Sequence[torch.Tensor]) -> list[CodingSource]:
        """Sources in the bases of the Fisher information under the present layers' code.

        relative: cost [S, 1, 1] of an error in each source, over the mean cost.
        """
        fisher = self.fisher_sums([(len(metric), metric.shape[1]) for metric in form.metrics])
        baseline = [metric * cost.to(metric) for metric, cost in zip(form.metrics, relative, strict=True)]
        costs = zip((f.total for f in fisher), baseline, (m.spread() for m in form.moments), strict=True)
        mixture = Mixture(costs)
        bases = [
            moments.bases(mixture.metric(f.total, metric)).single()
            for moments, f, metric in zip(form.moments, fisher, baseline, strict=True)
        ]
        return measured(self, bases, self.all_sources("variances under the Fisher metric"))

    def _code(
        self, sources: Sequence[CodingSource], widths: Sequence[torch.Tensor], queries: Sequence[torch.Tensor] = ()
    ) -> nn.ModuleList:
        """The codes of all layers; queries: those of each layer's query bank, none for codes without one."""
        dim = self.task.geometry.head_dim
        parts = zip(sources, widths, self.budget.channel_limits(widths), strict=True)
        transforms = [source.transform(w, self.heads, dim, most) for source, w, most in parts]
        return nn.ModuleList(transform_layers(transforms, [self.query_bank([of_layer]) for of_layer in queries]))

    def _widths(self, costs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Bits of every cell of every source, by the cost of leaving it out."""
        options, budget = self.task.recipe.transform, self.budget
        if options.key_bits is None or options.value_bits is None:
            return budget.allocate(costs, budget.code_bytes(len(costs)))
        one = budget.elements(len(costs) // 2) / 8
        keys = budget.allocate(costs[::2], int(options.key_bits * one))
        values = budget.allocate(costs[1::2], int(options.value_bits * one))
        return [w for pair in zip(keys, values, strict=True) for w in pair]

    def _widths_by_rule(self, sources: Sequence[CodingSource]) -> list[torch.Tensor]:
        """The same, where a rule says what each layer gets."""
        n, recipe = len(sources), self.task.recipe
        shares = pyramid(1 / n, n // 2, recipe.codec.pyramid if recipe.transform.allocation == "pyramid" else 0.0)
        # Keys are measured by the scores that they make, values by themselves: each by its own total, so that they
        # compare.
        cells = [source.cells / source.cells.sum().clamp_min(1e-12) for source in sources]
        total = self.budget.code_bytes(n)
        pairs = [
            self.budget.allocate(cells[2 * i : 2 * i + 2], int(total * 2 * share)) for i, share in enumerate(shares)
        ]
        return [w for pair in pairs for w in pair]


def _bytes(transform: Transform) -> int:
    """Bytes of one tile's codes."""
    return int(transform.widths.long().sum())
