"""Training of the family coded-compact: a bank of queries, axes of the kept rows, and the rows and bits of every layer,
all in closed form or by comparing candidates."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.cli.progress import tracked
from kvcapsule.cli.tables import Column, ReportTable
from kvcapsule.codec import CodecConfig
from kvcapsule.codec.coded_compact import CodedCompactConfig, CodedCompactLayer, RowCoding
from kvcapsule.codec.compact import CompactLayer
from kvcapsule.errors import ConfigError
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.bit_packing import GROUP
from kvcapsule.segments.segment import Segment

from ..attention_gradients import Sensitivity, sensitivities
from ..capsule_fit import CapsuleFit, Task
from ..harvest import LayerHarvest
from ..losses import full_output
from .bit_budget import BitBudget
from .coded_axes import Axes, Grids, RowMoments
from .coded_compact_options import CodedCompactRecipe
from .coded_search import Candidate, PartShape, allocate_widths, choose
from .compact import query_banks

_ROWS = (8, 16, 24, 32, 48, 64, 96)
"""Numbers of rows that are tried, as far as they are below a tile."""
_BITS = (1.5, 2.25, 3.25, 4.5)
"""Mean bits of a channel that are tried: for keys and values the same, or neighbouring ones."""
_REACH = (0.5, 1.8)
"""Least and most bytes of a layer's candidates, relative to an even share of the budget."""


class Errors(nn.Module):
    """Sum of the errors of each candidate."""

    total: torch.Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(count, dtype=torch.float64))


class LayerAxes(NamedTuple):
    """Axes and grids of the keys and the values of one layer."""

    axes: tuple[Axes, Axes]
    grids: tuple[Grids, Grids]

    def codings(self, candidate: Candidate) -> tuple[RowCoding, RowCoding]:
        """Of the keys and the values of a candidate."""
        shapes = (candidate.keys, candidate.values)
        keys, values = (a.coding(s.widths, g) for a, s, g in zip(self.axes, shapes, self.grids, strict=True))
        return keys, values


class CodedCompactFit(CapsuleFit[CodedCompactRecipe]):
    """Nothing descends: `prepare` does it all."""

    recipe_class = CodedCompactRecipe

    def __init__(self, task: Task[CodedCompactRecipe]) -> None:
        super().__init__(task)
        self.options = task.recipe.coded
        self.config = self._config([1] * task.layers, [1] * task.layers, [1] * task.layers)

    def _config(
        self, rows: Sequence[int], key_channels: Sequence[int], value_channels: Sequence[int], scale: float = 0.0
    ) -> CodedCompactConfig:
        task = self.task
        return CodedCompactConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            ratios=tuple(count / task.tile for count in rows),
            bank=self.options.bank,
            ridge=self.options.ridge,
            passes=self.options.passes,
            scale=scale,
            key_channels=tuple(key_channels),
            value_channels=tuple(value_channels),
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
        layers = self.task.layers
        least = self._candidate(1, 1.0, (_flat(1), _flat(1))).bytes
        if self.budget < layers * least:
            raise ConfigError(
                f"a compression of {self.task.recipe.compression:g} leaves {self.budget // layers} bytes of a tile and"
                f" layer, and one row with its scales takes {least}. Ask for less (--compression), or take a larger"
                " --codec.tile."
            )

    def _candidate(self, rows: int, error: float, shapes: tuple[PartShape, PartShape]) -> Candidate:
        heads = self.task.geometry.kv_heads
        return Candidate(rows, *shapes, heads * (sum(s.head_bytes(rows) for s in shapes) + rows), error)

    def prepare(self) -> None:
        geometry, recipe = self.task.geometry, self.task.recipe
        banks, scale, _ = query_banks(self, self.options.bank)
        batches = list(self.batches(self.options.search_batches, "what the answers feel of attention's error"))
        samples = []
        for step, batch in enumerate(batches):
            seeds = [recipe.seed * 1_000_003 + number for number in self.numbers(step, len(batch.answers))]
            canonical = recipe.codec.canonical_frame
            samples.append(sensitivities(self.task.model, batch, self.task.tile, canonical, seeds))
        axes, tried = [], []
        for index in tracked(range(self.task.layers), "rows and bits of layers", self.task.layers, self.task.console):
            of_layer = [layers[index] for layers in samples]
            axes.append(self._axes(banks[index], scale, of_layer))
            tried.append(self._tried(banks[index], scale, axes[-1], of_layer))
        chosen = choose(tried, self.budget)
        self.config = self._config(
            [c.rows for c in chosen],
            [len(c.keys.widths) for c in chosen],
            [len(c.values.widths) for c in chosen],
            scale,
        )
        self.layers = nn.ModuleList(self.config.build(geometry, i) for i in range(self.task.layers))
        for index, (bank, candidate, layer_axes) in enumerate(zip(banks, chosen, axes, strict=True)):
            codec = self.codec(index)
            codec.bank.copy_(bank)
            codec.set_codings(*layer_axes.codings(candidate))

    def _codec(self, bank: torch.Tensor, scale: float, rows: int) -> CodedCompactLayer:
        """A codec of one layer whose own coding is not set."""
        geometry = self.task.geometry
        codec = CodedCompactLayer(
            geometry.kv_heads, geometry.head_dim, rows, (1, 1), self._config([rows], [1], [1], scale)
        ).to(bank.device)
        codec.bank.copy_(bank)
        return codec

    def _axes(self, bank: torch.Tensor, scale: float, samples: Sequence[Sensitivity]) -> LayerAxes:
        """From the kept keys and refit values of an unquantised compact codec."""
        geometry = self.task.geometry
        codec = self._codec(bank, scale, self._rows()[len(self._rows()) // 2])
        rows: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for sensitivity in samples:
            exact = CompactLayer.encode(codec, sensitivity.layer.keys.float(), sensitivity.layer.values.float())
            for part, stored in zip(rows, (exact.keys.keys, exact.values.values), strict=True):
                assert isinstance(stored, torch.Tensor)
                part.append(stored)
        queries = bank.double() * codec.scale
        identity = torch.eye(geometry.head_dim).expand(geometry.kv_heads, -1, -1).to(queries)
        metrics = (queries.transpose(1, 2) @ queries / queries.shape[1], identity)
        axes, grids = [], []
        for part, metric in zip(rows, metrics, strict=True):
            moments = RowMoments(geometry.kv_heads, geometry.head_dim).to(bank.device)
            for x in part:
                moments.add(x)
            self.reduce(moments)
            axes.append(moments.axes(metric))
            grids.append(Grids(geometry.kv_heads, geometry.head_dim).to(bank.device))
            for x in part:
                grids[-1].add(x.double() @ axes[-1].into[None])
            self.reduce(grids[-1])
        return LayerAxes((axes[0], axes[1]), (grids[0], grids[1]))

    def _rows(self) -> list[int]:
        """Numbers of rows that are tried: an even share of the budget gives their channels one to eight bits."""
        tile, geometry = self.task.tile, self.task.geometry
        bits = 8 * self.budget / (2 * self.task.layers * geometry.kv_heads * geometry.head_dim)
        rows = [count for count in _ROWS if count < tile and bits / 8 <= count <= max(bits, GROUP)]
        return rows or [max(1, tile // 2)]

    def _tried(
        self, bank: torch.Tensor, scale: float, axes: LayerAxes, samples: Sequence[Sensitivity]
    ) -> list[Candidate]:
        """The candidates of a layer, with their errors on the batches."""
        even = self.budget / self.task.layers
        smallest = self._candidate(1, 0.0, (_flat(1), _flat(1)))
        tried = self._measured(self._codec(bank, scale, 1), axes, [smallest], samples)
        for rows in self._rows():
            shapes = [[allocate_widths(a.energy, a.variance, bits, rows) for bits in _BITS] for a in axes.axes]
            pairs = [pair for pair in product(*map(enumerate, shapes)) if abs(pair[0][0] - pair[1][0]) <= 1]
            options = [self._candidate(rows, 0.0, (keys, values)) for (_, keys), (_, values) in pairs]
            options = [c for c in options if _REACH[0] * even <= c.bytes <= _REACH[1] * even]
            if options:
                tried += self._measured(self._codec(bank, scale, rows), axes, options, samples)
        return tried

    def _measured(
        self, codec: CodedCompactLayer, axes: LayerAxes, options: Sequence[Candidate], samples: Sequence[Sensitivity]
    ) -> list[Candidate]:
        """Candidates of equally many rows, with their errors."""
        errors = Errors(len(options)).to(codec.bank.device)
        codings = [axes.codings(option) for option in options]
        for layer, cost in samples:
            truth = full_output(layer)
            for i, encoded in enumerate(codec.encode_with(layer.keys.float(), layer.values.float(), codings)):
                errors.total[i] += _output_cost(layer, encoded.segment(layer.owner, layer.frame), truth, cost)
        self.reduce(errors)
        return [option._replace(error=float(e)) for option, e in zip(options, errors.total, strict=True)]

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
            shape = [text for part in ("key", "value") for text in _described(codec.coding(part).form.widths)]
            table.add(str(layer), str(codec.stored), str(self.task.tile), *shape)
        return table


def _flat(bits: int) -> PartShape:
    """One channel."""
    return PartShape(torch.tensor([bits], dtype=torch.uint8))


def _described(widths: torch.Tensor) -> tuple[str, str]:
    """Channels, and bits of a row."""
    return str(len(widths)), str(int(widths.sum()))


def _output_cost(layer: LayerHarvest, segment: Segment, truth: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Expected KL of the answers' logits for what attention's output loses."""
    error = attend(layer.query, [segment, layer.rest], layer.scale, layer.visible) - truth
    squares = error.float().square().sum(-1).masked_fill(~layer.reads[:, None], 0.0)
    return (squares * cost).sum()
