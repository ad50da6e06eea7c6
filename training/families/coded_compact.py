"""Training of the family coded-compact: a bank of queries, axes of the values, and the rows and bits of every layer,
all in closed form or by comparing candidates."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.cli.progress import tracked
from kvcapsule.cli.tables import Column, ReportTable
from kvcapsule.codec import CodecConfig
from kvcapsule.codec.coded_compact import CodedCompactConfig, CodedCompactLayer, Codings
from kvcapsule.codec.compact import CompactLayer
from kvcapsule.errors import ConfigError
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.segment import Segment

from ..attention_gradients import Sensitivity, sensitivities
from ..capsule_fit import CapsuleFit, Task
from ..harvest import LayerHarvest
from ..losses import full_output
from .bit_budget import BitBudget
from .coded_axes import Channels, RowSums
from .coded_compact_options import CodedCompactRecipe
from .coded_search import Candidates, allocate_widths, choose, head_bytes
from .compact import query_banks

_ROWS = (4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128)
"""Numbers of rows that are tried, as far as they are below a tile."""
_BITS = (1.75, 2.25, 2.75, 3.25, 4.0)
"""Mean bits of a channel that are tried, for keys and for values."""
_FEWEST, _MOST = 2, 6
"""Bits of a channel that rows must leave in an even share of the budget."""
_REACH = 1.9
"""Most bytes of a layer's candidates, relative to an even share of the budget."""
_LEAST = 0.2
"""Least error of two ways together, relative to the smaller one of each measured apart."""


class Errors(nn.Module):
    """Sum of the errors of each candidate and head."""

    total: torch.Tensor

    def __init__(self, count: int, heads: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(count, heads, dtype=torch.float64))


class LayerRows(NamedTuple):
    """Statistics of the stored rows of one layer, from which the bits of its channels follow."""

    keys: Channels
    values: Channels
    """Along their axes."""
    axes: torch.Tensor
    """[H, D, D]."""
    weight: torch.Tensor
    """[H, D]: what an error of a key's channel costs."""

    def widths(self, bits: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits of the channels of keys and values."""
        keys = (self.keys.energy * self.weight, self.keys.variance * self.weight)
        return allocate_widths(*keys, bits, rows), allocate_widths(self.values.energy, self.values.variance, bits, rows)

    def codings(self, keys: torch.Tensor, values: torch.Tensor) -> Codings:
        """How the layer is coded, given the widths [H, C] of the channels of its keys and of its values."""
        axes = self.axes.float()
        return Codings(self.keys.form(keys), self.values.form(values), axes, axes.transpose(1, 2))


class CodedCompactFit(CapsuleFit[CodedCompactRecipe]):
    """Trains coded compact codecs: `prepare` makes the query banks and chooses rows and bits; there is no descent."""

    recipe_class = CodedCompactRecipe

    def __init__(self, task: Task[CodedCompactRecipe]) -> None:
        super().__init__(task)
        self.options = task.recipe.coded
        self.config = self._config([1] * task.layers)

    def _config(self, rows: Sequence[int], scale: float = 0.0) -> CodedCompactConfig:
        task = self.task
        return CodedCompactConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            ratios=tuple(count / task.tile for count in rows),
            bank=self.options.bank,
            ridge=self.options.ridge,
            passes=self.options.passes,
            scale=scale,
        )

    @property
    def budget(self) -> int:
        """Bytes of a tile in all layers."""
        task = self.task
        framed = task.recipe.codec.canonical_frame and task.geometry.rotary != "none"
        bits = BitBudget(
            task.geometry,
            task.tile,
            16 / task.recipe.compression,
            framed=framed,
            max_map_mib=0,
            show=self.show,
        )
        return bits.code_bytes(2 * task.layers)

    def require_feasible(self, tiles: int | None) -> None:
        layers, least = self.task.layers, 3 * self.task.geometry.kv_heads
        if self.budget < layers * least:
            raise ConfigError(
                f"a compression of {self.task.recipe.compression:g} leaves {self.budget // layers} bytes of a tile and"
                f" layer, and one row of one channel with its scale and bias takes {least}. Ask for less"
                " (--compression), or take a larger --codec.tile."
            )

    def prepare(self) -> None:
        geometry, recipe = self.task.geometry, self.task.recipe
        banks, scale, _ = query_banks(self, self.options.bank)
        batches = list(self.batches(self.options.search_batches, "what the answers feel of attention's error"))
        samples = []
        for step, batch in enumerate(batches):
            seeds = [recipe.seed * 1_000_003 + number for number in self.numbers(step, len(batch.answers))]
            canonical = recipe.codec.canonical_frame
            samples.append(sensitivities(self.task.model, batch, self.task.tile, canonical, seeds))
        described, tried = [], []
        for index in tracked(range(self.task.layers), "rows and bits of layers", self.task.layers, self.task.console):
            of_layer = [layers[index] for layers in samples]
            described.append(self._described(banks[index], scale, of_layer))
            tried.append(self._tried(banks[index], scale, described[-1], of_layer))
        chosen = choose(tried, self.budget)
        self.config = self._config([choice.rows for choice in chosen], scale)
        self.layers = nn.ModuleList(self.config.build(geometry, i) for i in range(self.task.layers))
        for index, (bank, choice, rows) in enumerate(zip(banks, chosen, described, strict=True)):
            codec = self.codec(index)
            codec.bank.copy_(bank)
            codec.set_codings(rows.codings(choice.keys, choice.values))

    def _codec(self, bank: torch.Tensor, scale: float, rows: int) -> CodedCompactLayer:
        """A codec of one layer whose own codings are not set."""
        geometry = self.task.geometry
        config = self._config([rows], scale)
        codec = CodedCompactLayer(geometry.kv_heads, geometry.head_dim, rows, config).to(bank.device)
        codec.bank.copy_(bank)
        return codec

    def _described(self, bank: torch.Tensor, scale: float, samples: Sequence[Sensitivity]) -> LayerRows:
        """From the kept keys and refit values of an unquantised compact codec."""
        codec = self._codec(bank, scale, self._rows()[len(self._rows()) // 2])
        kept = [
            CompactLayer.encode(codec, sensitivity.layer.keys.float(), sensitivity.layer.values.float())
            for sensitivity in samples
        ]
        keys, values = ([getattr(getattr(e, part), part) for e in kept] for part in ("keys", "values"))
        axes = self._sums(values).axes()
        along = self._sums([x.double() @ axes for x in values]).channels()
        of_keys = self._sums(keys).channels()
        four = torch.full_like(of_keys.mean, 4, dtype=torch.uint8)
        return LayerRows(of_keys, along, axes, codec.metric(of_keys.form(four), torch.float32).weight.double())

    def _sums(self, rows: Sequence[torch.Tensor]) -> RowSums:
        geometry = self.task.geometry
        sums = RowSums(geometry.kv_heads, geometry.head_dim).to(rows[0].device)
        for x in rows:
            sums.add(x)
        self.reduce(sums)
        return sums

    def _rows(self) -> list[int]:
        """Numbers of rows that are tried."""
        tile, geometry = self.task.tile, self.task.geometry
        bits = 8 * self.budget / (2 * self.task.layers * geometry.kv_heads * geometry.head_dim)
        rows = [count for count in _ROWS if count < tile and bits / _MOST <= count <= bits / _FEWEST]
        return rows or [max(1, min(tile // 2, int(bits / _FEWEST)))]

    def _tried(
        self, bank: torch.Tensor, scale: float, described: LayerRows, samples: Sequence[Sensitivity]
    ) -> list[Candidates]:
        """The candidates of a layer, with their errors on the batches."""
        one = torch.zeros_like(described.weight, dtype=torch.uint8)
        one[:, 0] = 1
        tried = [self._measured(self._codec(bank, scale, 1), described, ([one], [one]), samples)]
        most = _REACH * self.budget / self.task.layers
        for rows in self._rows():
            keys, values = zip(*(described.widths(bits, rows) for bits in _BITS), strict=True)
            sizes = [[int(head_bytes(widths, rows).sum()) for widths in ways] for ways in (keys, values)]
            ways = [
                [w for w, size in zip(mine, of_mine, strict=True) if size + min(of_other) <= most]
                for mine, of_mine, of_other in ((keys, *sizes), (values, *sizes[::-1]))
            ]
            if all(ways):
                tried.append(self._measured(self._codec(bank, scale, rows), described, (ways[0], ways[1]), samples))
        return tried

    def _measured(
        self,
        codec: CodedCompactLayer,
        described: LayerRows,
        ways: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        samples: Sequence[Sensitivity],
    ) -> Candidates:
        """Candidates of equally many rows: ways to code the keys beside values in the middle one, and ways to code the
        values beside keys in the middle one; what keys and values add to the error is added up."""
        keys, values = ways
        middle = described.codings(keys[len(keys) // 2], values[len(values) // 2])
        codings = [middle._replace(keys=described.keys.form(widths)) for widths in keys]
        codings[len(keys) // 2] = middle
        codings += [middle._replace(values=described.values.form(widths)) for widths in values]
        errors = Errors(len(codings), self.task.geometry.kv_heads).to(codec.bank.device)
        for layer, cost in samples:
            truth = full_output(layer)
            tiles = codec.encode_with(layer.keys.float(), layer.values.float(), codings)
            for i, encoded in enumerate(tiles):
                errors.total[i] += _output_cost(layer, encoded.segment(layer.owner, layer.frame), truth, cost)
        self.reduce(errors)
        of_keys, of_values = errors.total.cpu().split([len(keys), len(values)])
        least = _LEAST * torch.minimum(of_keys[:, None], of_values)
        error = torch.maximum(of_keys[:, None] + of_values - of_keys[len(keys) // 2], least)
        # Choices are made on the host.
        on_host = [torch.stack([*widths]).cpu() for widths in (keys, values)]
        return Candidates.of(codec.stored, on_host[0], on_host[1], error)

    def restore(self, config: CodecConfig, layers: Mapping[str, torch.Tensor]) -> None:
        assert isinstance(config, CodedCompactConfig)
        self.config = config
        super().restore(config, layers)

    def codec_config(self) -> CodedCompactConfig:
        return self.config

    def codec(self, index: int) -> CodedCompactLayer:
        codec = self.layers[index]
        assert isinstance(codec, CodedCompactLayer)
        return codec

    def derived(self) -> ReportTable:
        names = ("layer", "rows", "of", "key channels", "key bits", "value channels", "value bits")
        table = ReportTable(
            [*map(Column, names)], title=f"{self.task.recipe.model}: tiles of {self.task.tile} visual tokens"
        )
        for index, layer in enumerate(self.task.geometry.capsule_layers):
            codec = self.codec(index)
            codings = codec.codings()
            shape = [text for form in (codings.keys, codings.values) for text in _shown(form.widths)]
            table.add(str(layer), str(codec.stored), str(self.task.tile), *shape)
        return table


def _shown(widths_HC: torch.Tensor) -> tuple[str, str]:
    """Channels with bits, and bits of a row; of all heads."""
    return str(int((widths_HC > 0).sum())), str(int(widths_HC.sum()))


def _output_cost(layer: LayerHarvest, segment: Segment, truth: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """[H]: expected KL of the answers' logits for what each KV head's output of attention loses."""
    error = attend(layer.query, [segment, layer.rest], layer.scale, layer.visible) - truth
    squares = error.float().square().sum(-1).masked_fill(~layer.reads[:, None], 0.0)
    of_heads: torch.Tensor = (squares * cost).sum((0, 2)).unflatten(0, (segment.keys.shape[1], -1)).sum(1)
    return of_heads
