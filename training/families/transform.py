"""Training of the transform family: bases and widths in closed form, twice; then, if asked, gradient descent through
the quantiser."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn

from kvcapsule.codec import LayerCodec, StackCodec
from kvcapsule.codec.base import KeyPart, ValuePart
from kvcapsule.codec.kvcapsule import pyramid
from kvcapsule.codec.noise_shaping import Readers
from kvcapsule.codec.transform import (
    CellTransform,
    Transform,
    TransformConfig,
    TransformKeys,
    TransformLayer,
    TransformValues,
    side_by_side,
)
from kvcapsule.segments.segment import Segment

from ..capsule_fit import CapsuleFit, Task, scheduled
from ..datamodule import Batch
from ..fisher import Felt, gradients, mixed, require_finite_gradients
from ..harvest import LayerHarvest
from ..losses import error_and_energy, full_output, output_error, require_finite
from ..query_bank import QueryBank
from .allocation import REACHING, allocate, distortion
from .coding_source import LEAST_STEP, Unit
from .grouping import joint_heads
from .map_budget import most_channels, usual_limit
from .spectra import Bases, CoefficientMoments, Extremes, Moments, QueryMoments
from .straight_through import coded

_COARSE = 0.8
"""Bits an element up to which the learning rate is the recipe's."""
_WARMUP = 10
"""Steps over which the learning rate rises."""
_PROBE = 2.0
"""Most bits an element at which the allocation probes: with more, a layer's error is lost among rounding errors."""


Sources = Callable[[Sequence[LayerHarvest], bool], Iterator[tuple[int, torch.Tensor]]]
"""Of a harvest, the number and the tiles [E, S, T, W] of each source."""


class TransformFit(CapsuleFit):
    """Closed forms, then Adam on all that is continuous.

    A first code is solved from second moments and shares its bits out by attention's output; a second one by what the
    logits feel where the first leaves keys and values (`felt`). What is coded as one is a source: the keys or the
    values of a layer.
    """

    has_kl = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.recipe = task.recipe.transform
        heads = task.geometry.kv_heads
        self.heads = self.recipe.joint_heads or joint_heads(heads, task.geometry.head_dim)
        if heads % self.heads:
            raise ValueError(
                f"--transform.joint_heads {self.heads} does not divide the model's {heads} KV heads: choose a divisor."
            )

    @property
    def steps(self) -> int:
        return self.recipe.steps

    def prepare(self) -> None:
        batches, dim = self.task.recipe.moment_batches, self.task.geometry.head_dim
        units = self._units(batches)

        def code(units: list[Unit], widths: list[torch.Tensor], readers: Sequence[Readers | None]) -> nn.ModuleList:
            return _layers([unit.transform(w, self.heads, dim) for unit, w in zip(units, widths, strict=True)], readers)

        layers = self.task.geometry.layers
        if self.recipe.allocation != "output":
            widths = self._shared_by_rule(units)
        else:
            costs = self.sensitivities(units)
            usual = torch.stack(costs).mean().clamp_min(1e-12)
            by_set = [(cost / usual)[:, None, None] for cost in costs]
            widths = self._shared([unit.cells * cost.to(unit.cells) for unit, cost in zip(units, by_set, strict=True)])
            if self.recipe.felt_batches:
                self.layers = code(units, widths, [None] * layers)
                metrics = self.felt(
                    [metric * cost.to(metric) for metric, cost in zip(self.metrics, by_set, strict=True)], self.moments
                )
                bases = [moments.bases(metric) for moments, metric in zip(self.moments, metrics, strict=True)]
                units = self.measured(bases, self.tiles(batches, "variances of what the logits feel", self.sources))
                widths = self._shared([unit.cells for unit in units])
        self.layers = code(units, widths, [self.readers([i]) for i in range(layers)])

    def codec_config(self) -> TransformConfig:
        task, transforms = self.task, [self._transforms(i) for i in range(len(self.layers))]
        rows = [[t.tokens_in.shape[1] for t in pair] for pair in transforms]
        channels = [[t.channels_in.shape[2] for t in pair] for pair in transforms]
        return TransformConfig(
            tile=task.tile,
            canonical_frame=task.recipe.codec.canonical_frame,
            key_rows=tuple(k for k, _ in rows),
            key_channels=tuple(k for k, _ in channels),
            value_rows=tuple(v for _, v in rows),
            value_channels=tuple(v for _, v in channels),
            joint_heads=self.heads,
            readers=self.recipe.readers,
            bits=round(
                sum(_bytes(t) for pair in transforms for t in pair) * 8 / self._elements(2 * len(transforms)), 4
            ),
        )

    def codec(self, index: int) -> LayerCodec | StackCodec:
        return self._pair(index)

    def segments(self, layers: Sequence[LayerHarvest]) -> list[Segment]:
        return [self._read(i, layer, True, True) for i, layer in enumerate(layers)]

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        recipe, loss = self.recipe, torch.zeros((), device=self.device)
        layers, segments, kl = self.read(batch, recipe.kl_weight > 0)
        if recipe.output_weight:
            error = torch.stack(
                [output_error(x, s, full_output(x)) for x, s in zip(layers, segments, strict=True)]
            ).mean()
            self.log("train/output_error", error, prog_bar=True)
            loss = loss + recipe.output_weight * error * len(layers)
        if kl is not None:
            self.log("train/kl", kl, prog_bar=True)
            loss = loss + recipe.kl_weight * kl
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        # The quantiser's error halves with each bit, and what moves the bases by more than that makes a fine code
        # worse.
        lr = self.recipe.lr * min(1.0, 2.0 ** (_COARSE - self.task.recipe.element_bits))
        return scheduled(self.layers.parameters(), lr, self._rate, betas=(0.9, 0.98))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for codec in self.layers.modules():
                if isinstance(codec, CellTransform):
                    codec.step.clamp_min_(LEAST_STEP)

    def derived(self) -> Table:
        task = self.task
        maps = sum(t.decoder_bytes() for i in range(len(self.layers)) for t in self._transforms(i)) / 2**20
        bits = self.codec_config().bits
        table = Table(
            title=(
                f"{task.recipe.model}: tiles of {task.tile} visual tokens, {bits:.3f} bit an element, {maps:.1f} MiB of"
                " maps stored once"
            )
        )
        for column in ("layer", "key bits", "value bits", "key rows x channels", "value rows x channels"):
            table.add_column(column, justify="right")
        for i in range(len(self.layers)):
            pair = self._transforms(i)
            each = (f"{_bytes(t) * 8 / self._elements(1):.2f}" for t in pair)
            table.add_row(str(i), *each, *(f"{t.tokens_in.shape[1]} x {t.channels_in.shape[2]}" for t in pair))
        return table

    def _rate(self, step: int) -> float:
        """A short rise, then a cosine to zero."""
        return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps))))

    def _pair(self, layer: int) -> TransformLayer:
        codec = self.layers[layer]
        assert isinstance(codec, TransformLayer)
        return codec

    def _transforms(self, layer: int) -> tuple[Transform, Transform]:
        codec = self._pair(layer)
        return codec.keys.transform, codec.values.transform

    def _read(self, index: int, layer: LayerHarvest, keys: bool, values: bool) -> Segment:
        """A layer's tiles with its keys or values coded, or both, as reading the codes would give them."""
        codec = self._pair(index)
        key_part, value_part = KeyPart(layer.keys), ValuePart(layer.values)
        weights = None if codec.readers is None else codec.readers(layer.keys.float())
        if keys:
            transform = codec.keys.transform
            key_part = codec.keys.part(coded(transform, transform.coefficients(layer.keys.float()), weights))
        if values:
            transform = codec.values.transform
            value_part = codec.values.part(coded(transform, transform.coefficients(layer.values.float()), weights))
        return Segment(owner=layer.owner, frame=layer.frame, **key_part._asdict(), **value_part._asdict())

    def readers(self, layers: Sequence[int]) -> Readers | None:
        """The bank of these layers, which one code serves."""
        if not self.banks:
            return None
        queries = torch.stack([self.banks[i].bank() for i in layers]) * self.scale
        built = Readers(*queries.shape, self.heads).to(queries.device)
        built.queries.copy_(queries)
        return built

    def _elements(self, units: int) -> int:
        """Elements of one tile in so many units (the keys or the values of a layer)."""
        return units * self.task.tile * self.task.geometry.kv_heads * self.task.geometry.head_dim

    def _units(self, batches: int) -> list[Unit]:
        """Keys and values of every layer in turn: bases from one pass, variances and extremes of their coefficients
        from a second."""
        geometry, tile, device = self.task.geometry, self.task.tile, self.task.model.device
        sets, width = geometry.kv_heads // self.heads, geometry.head_dim * self.heads
        self.moments = moments = [Moments(sets, tile, width).to(device) for _ in range(2 * geometry.layers)]
        queries = [QueryMoments(geometry.kv_heads, geometry.head_dim).to(device) for _ in range(geometry.layers)]
        seed = self.task.recipe.seed
        self.banks = (
            [QueryBank(self.recipe.readers, seed + i) for i in range(geometry.layers)] if self.recipe.readers else []
        )
        for step, batch in enumerate(self.batches(batches, "moments of keys and values")):
            numbers = self.numbers(step, len(batch.answers))
            for i, layer in enumerate(self.harvest(batch)):
                require_finite(layer, i)
                moments[2 * i].add(side_by_side(layer.keys, self.heads))
                moments[2 * i + 1].add(side_by_side(layer.values, self.heads))
                queries[i].add(layer)
                for bank in self.banks[i : i + 1]:
                    bank.add(layer, numbers)
                    self.scale = layer.scale
        for bank in self.banks:
            bank.gather()
            if bank.found < bank.size:
                raise ValueError(
                    f"--transform.readers {bank.size}: only {bank.found} queries read the tiles of a KV head. Look at"
                    " more batches (--moment_batches), or ask for fewer."
                )
        for sums in (*moments, *queries):
            self.reduce(sums)
        self._require_samples(moments[0])
        one = torch.eye(width, dtype=torch.float64, device=device).expand(sets, width, width)
        self.metrics = []
        for query in queries:
            heads = query.metric().unflatten(0, (sets, self.heads))
            self.metrics += [
                torch.stack([torch.block_diag(*own) for own in heads]) if self.recipe.query_metric else one,
                one,
            ]
        bases = [
            own.bases(None if metric is one else metric) for own, metric in zip(moments, self.metrics, strict=True)
        ]
        return self.measured(bases, self.tiles(batches, "variances of their coefficients", self.units_of))

    def tiles(self, batches: int, title: str, of: Sources) -> Iterator[tuple[int, torch.Tensor]]:
        """Each source's number and its tiles of each batch."""
        for batch in self.batches(batches, title):
            yield from of(self.harvest(batch), False)

    def units_of(self, layers: Sequence[LayerHarvest], gradients: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """Keys and values of each layer in turn, a set's heads side by side: [E, S, T, W]."""
        for i, layer in enumerate(layers):
            for part, x in enumerate((layer.keys, layer.values)):
                yield 2 * i + part, side_by_side(x.double(), self.heads)

    def sources(self, layers: Sequence[LayerHarvest], gradients: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and tiles [E, S, T, W] of each source, in its coordinates.

        gradients: whether the layers hold gradients in place of keys and values: in other coordinates these turn the
            other way.
        """
        return self.units_of(layers, gradients)

    def felt(self, usual: list[torch.Tensor], moments: list[Moments]) -> list[torch.Tensor]:
        """Metrics [S, W, W] of the sources: what the logits feel where the present layers' code leaves them, mixed with
        the usual ones."""
        task, canonical = self.task, self.task.recipe.codec.canonical_frame
        sums = [Felt(*metric.shape[:2]).to(metric.device) for metric in usual]
        for step, batch in enumerate(self.batches(self.recipe.felt_batches, "what the logits feel")):
            layers = self.harvest(batch)
            with torch.no_grad():
                read = self.segments(layers)
            seeds = [task.recipe.seed + n for n in self.numbers(step, len(batch.answers))]
            found = gradients(task.model, batch, task.tile, canonical, layers, read, seeds)
            require_finite_gradients(found)
            for source, g in self.sources(found, True):
                sums[source].add(g)
        for own in sums:
            self.reduce(own)
        return mixed(sums, usual, moments)

    def measured(self, bases: Sequence[Bases], tiles: Iterator[tuple[int, torch.Tensor]]) -> list[Unit]:
        """Units with the variances and extremes of their coefficients in given bases, over all ranks; tiles come with
        their number."""
        sizes = [(*b.tokens.shape[:2], b.channels_in.shape[2]) for b in bases]
        coefficients = [CoefficientMoments(*size).to(b.tokens.device) for size, b in zip(sizes, bases, strict=True)]
        extremes = [Extremes(*size).to(b.tokens.device) for size, b in zip(sizes, bases, strict=True)]
        for unit, x in tiles:
            found = bases[unit].coefficients(x)
            coefficients[unit].add(found)
            extremes[unit].add(found)
        for sums, ends in zip(coefficients, extremes, strict=True):
            self.reduce(sums)
            self.reduce(ends, greatest=True)
        return [Unit(b, c, e) for b, c, e in zip(bases, coefficients, extremes, strict=True)]

    def _require_samples(self, moments: Moments) -> None:
        """Raises ValueError where the tiles are too few for the bases to be more than these tiles' own."""
        tiles, needed = int(moments.count), -(-2 * self.task.tile // (self.task.geometry.head_dim * self.heads)) * 8
        if tiles < needed:
            raise ValueError(
                f"{tiles} tiles are too few for stable bases of {self.task.tile} tokens: at least {needed} are needed."
                " Give more questions (--data.size), look at more of them (--moment_batches), or choose a smaller"
                " --codec.tile."
            )

    def _shared(self, costs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Bits of every cell of every source, by what leaving it out costs."""
        keys, values = self.recipe.key_bits, self.recipe.value_bits
        if keys is None or values is None:
            return self.allocated(costs, self.budget(len(costs)))
        one = self._elements(len(costs) // 2) / 8
        pairs = zip(
            self.allocated(costs[::2], int(keys * one)), self.allocated(costs[1::2], int(values * one)), strict=True
        )
        return [w for pair in pairs for w in pair]

    def _shared_by_rule(self, units: list[Unit]) -> list[torch.Tensor]:
        """The same, where a rule says what each layer gets."""
        n = len(units)
        shares = pyramid(1 / n, n // 2, self.task.recipe.codec.pyramid if self.recipe.allocation == "pyramid" else 0.0)
        # Keys are measured by the scores that they make, values by themselves: each by its own whole, so that they
        # compare.
        cells = [unit.cells / unit.cells.sum().clamp_min(1e-12) for unit in units]
        pairs = [
            self.allocated(cells[2 * i : 2 * i + 2], int(self.budget(n) * 2 * share)) for i, share in enumerate(shares)
        ]
        return [w for pair in pairs for w in pair]

    def allocated(self, costs: list[torch.Tensor], budget: int) -> list[torch.Tensor]:
        """Bits of cells [S, G, W] of sources within a budget; none for the last channels, which matter least, where
        maps would be too many.

        A bound that leaves bits unused is not kept to unless it was asked for, and then that is said.
        """
        geometry, wanted = self.task.geometry, self.recipe.maps
        sources = [(len(c), c.shape[2]) for c in costs]
        # Of all the sources' maps, these may take their part.
        part = sum(len(c) * c.shape[2] for c in costs) / (2 * geometry.layers * geometry.kv_heads * geometry.head_dim)
        channels = geometry.layers * geometry.kv_heads * geometry.head_dim
        limit = usual_limit(channels, sources, self.task.tile) if wanted is None else wanted
        most = most_channels(limit * part, sources, self.task.tile)
        widths = allocate(
            [c * (torch.arange(c.shape[2], device=c.device) < n) for c, n in zip(costs, most, strict=True)], budget
        )
        spent = sum(int(w.long().sum()) for w in widths)
        if spent < budget - REACHING and any(n < width for n, (_, width) in zip(most, sources, strict=True)):
            if wanted is None:
                return allocate(costs, budget)
            self.show(f"--transform.maps {wanted} leaves {budget - spent} of {budget} bytes of codes a tile unused.")
        return widths

    def budget(self, units: int) -> int:
        """Bytes of one tile's codes in so many units.

        Raises:
            ValueError: if they do not come to one for each.
        """
        stored, overhead = self.task.recipe.element_bits * self._elements(units) / 8, self._overhead()
        if stored - overhead < units:
            raise ValueError(
                f"{self.task.recipe.element_bits:.3g} bit an element are {stored:.0f} bytes a tile, of which"
                f" {overhead:.0f} are its address and frame: store more (--bits, --ratio) or take a larger"
                " --codec.tile."
            )
        return int(stored - overhead)

    def _overhead(self) -> float:
        """Bytes of a tile besides its codes: its owner and, where it has one, its frame; stored once for all layers."""
        rotary = self.task.geometry.rotary != "none" and self.task.recipe.codec.canonical_frame
        return 8 + (self.task.geometry.head_dim * 4 if rotary else 0)

    def sensitivities(self, units: list[Unit]) -> list[torch.Tensor]:
        """What an energy of one that a unit's sets of heads [S] lose adds to the error of attention's output, relative
        to its energy.

        Measured unit by unit: coded alone, at the budget's mean rate, under the queries that really read it.
        """
        dim, sets = self.task.geometry.head_dim, len(units[0].cells)
        budget = int(min(self.task.recipe.element_bits, _PROBE) * self._elements(1) / 8)
        probes = [allocate([unit.cells], budget)[0] for unit in units]
        transforms = [unit.transform(w, self.heads, dim) for unit, w in zip(units, probes, strict=True)]
        self.layers = _layers(transforms, [None] * self.task.geometry.layers)
        sums = _Sums(len(units), sets).to(self.task.model.device)
        with torch.no_grad():
            for batch in self.batches(self.recipe.probe_batches, "what each layer costs"):
                for i, layer in enumerate(self.harvest(batch)):
                    truth = full_output(layer)
                    for unit, keys in ((2 * i, True), (2 * i + 1, False)):
                        errors, energy = error_and_energy(layer, self._read(i, layer, keys, not keys), truth, sets)
                        sums.errors[unit] += errors
                        sums.energy[unit] += energy
        self.reduce(sums)
        lost = [
            (unit.cells.cpu() * distortion(probe)).sum((1, 2)).clamp_min(1e-12)
            for unit, probe in zip(units, probes, strict=True)
        ]
        return [error.cpu() / left for error, left in zip(sums.errors / sums.energy[:, None], lost, strict=True)]


class _Sums(nn.Module):
    """Errors of units' outputs by set of heads, and the outputs' energies, over batches."""

    errors: torch.Tensor
    energy: torch.Tensor

    def __init__(self, units: int, sets: int) -> None:
        super().__init__()
        self.register_buffer("errors", torch.zeros(units, sets, dtype=torch.float64))
        self.register_buffer("energy", torch.zeros(units, dtype=torch.float64))


def _layers(transforms: Sequence[Transform], readers: Sequence[Readers | None]) -> nn.ModuleList:
    """Layers of transforms of their keys and their values in turn."""
    pairs = zip(transforms[::2], transforms[1::2], readers, strict=True)
    return nn.ModuleList(TransformLayer(TransformKeys(k), TransformValues(v), r) for k, v, r in pairs)


def _bytes(transform: Transform) -> int:
    """Bytes of one tile's codes."""
    return int(transform.widths.long().sum())
