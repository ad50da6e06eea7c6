"""The closed form of a transform code: bases, coefficient statistics and costs of every layer's keys and values.

One pass of the frozen VLM over batches gathers all sums, added up over the ranks of a run, and a sample of the tiles;
what needs bases first is measured on the sample. E tiles, S sets of KV heads side by side (`head group`), T tokens of a
tile, W channels of a source, P parts of a layer group.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.codec.base import KeyPart, ValuePart
from kvcapsule.codec.bit_allocation import allocate, distortion
from kvcapsule.codec.coefficient_transform import merge_heads
from kvcapsule.codec.noise_shaping import TokenWeighting
from kvcapsule.codec.transform import Transform, TransformKeys, TransformLayer, TransformValues
from kvcapsule.errors import ConfigError
from kvcapsule.segments.segment import Segment
from kvcapsule.training_footprint import HARVEST, PROBE

from ..capsule_fit import CapsuleFit
from ..harvest import LayerHarvest
from ..joint_moments import JointMoments
from ..losses import error_and_energy, full_output, require_finite
from ..query_bank import QueryBank
from ..question_forward import decoded
from ..second_moments import Bases, CoefficientMoments, Extremes, Moments, QueryMoments
from ..tile_sample import LayerTiles
from .bit_budget import BitBudget
from .coding_source import CodingSource
from .coefficient_options import CoefficientRecipe
from .straight_through import coded

_PROBE = 2.0
"""Most bits an element at which the allocation probes: with more, a layer's error is lost among rounding errors."""

Tiles = Iterable[tuple[int, torch.Tensor]]
"""The number and the tiles [E, S, T, W] of each source."""
Use = Callable[[int, torch.Tensor], None]
"""Takes the number and some tiles of a source."""
EachTiles = Callable[[Use], None]
"""Hands the tiles of all sources on, some at a time."""
Fit = CapsuleFit[CoefficientRecipe]


class ClosedForm(NamedTuple):
    """What one layer's keys and values alone tell, and the sums of all parts of each layer group."""

    sources: list[CodingSource]
    """The keys and the values of every layer in turn."""
    moments: list[Moments]
    """Of the same."""
    joint: list[JointMoments]
    """Of each layer group, for what is coded together."""
    metrics: list[torch.Tensor]
    """[S, W, W] of each source: how much a squared error in each direction of the channels matters to attention's
    scores (keys) or by itself (values)."""
    queries: list[torch.Tensor]
    """[H, Q, D] of each layer: training queries times the scale of the scores; empty where tokens weigh alike."""


class Sums(nn.Module):
    """Sums of one pass over all batches."""

    def __init__(self, fit: Fit, heads: int, together: bool) -> None:
        """heads: KV heads of a set. together: whether all parts of a layer group are coded as one; else each alone."""
        super().__init__()
        geometry, options, seed = fit.task.geometry, fit.task.recipe.transform, fit.task.recipe.seed
        sets, width = geometry.kv_heads // heads, geometry.head_dim * heads
        self.fit, self.heads, self.scale = (fit,), heads, 0.0
        parts = [2 * len(group) for group in fit.groups] if together else [1] * (2 * fit.task.layers)
        firsts = [group[0] for group in fit.groups] if together else [i // 2 for i in range(len(parts))]
        self.joint = nn.ModuleList(
            JointMoments(count, sets, fit.task.tile, width).to(fit.devices[layer])
            for count, layer in zip(parts, firsts, strict=True)
        )
        self.queries = nn.ModuleList(
            QueryMoments(geometry.kv_heads, geometry.head_dim).to(device) for device in fit.devices
        )
        size = options.query_bank
        self.banks = [QueryBank(size, seed + i) for i in range(fit.task.layers)] if size else []
        self.numbers: Sequence[int] = ()

    def add(self, number: int, layers: Sequence[LayerHarvest]) -> None:
        """Take in a layer group of a batch."""
        group, parts, indices = self.fit[0].groups[number], [], self.fit[0].task.geometry.capsule_layers
        for i, layer in zip(group, layers, strict=True):
            require_finite(layer, indices[i])
            parts += [merge_heads(layer.keys, self.heads), merge_heads(layer.values, self.heads)]
            queries = self.queries[i]
            assert isinstance(queries, QueryMoments)
            queries.add(layer)
            if self.banks:
                self.banks[i].add(layer, self.numbers)
            self.scale = layer.scale
        for moments, tiles_of_parts in self._sums_of(number, parts):
            moments.add(tiles_of_parts)

    def _sums_of(self, number: int, parts: list[torch.Tensor]) -> list[tuple[JointMoments, list[torch.Tensor]]]:
        sums = [m for m in self.joint if isinstance(m, JointMoments)]
        if len(sums) == len(self.fit[0].groups):
            return [(sums[number], parts)]
        first = 2 * self.fit[0].groups[number].start
        return [(sums[first + i], [part]) for i, part in enumerate(parts)]

    def gather(self) -> None:
        """Join those of all ranks.

        Raises:
            ConfigError: for too few queries.
        """
        for bank in self.banks:
            bank.gather()
            if bank.available < bank.size:
                raise ConfigError(
                    f"--transform.query-bank {bank.size}: only {bank.available} queries read the tiles of a KV head."
                    " Look at more batches (--moment_batches), or ask for fewer."
                )
        for sums in (*self.joint, *self.queries):
            self.fit[0].reduce(sums)


def closed_form(fit: Fit, heads: int, together: bool) -> ClosedForm:
    """Bases from one pass over the batches, variances and extremes of their coefficients from a sample of its tiles.

    Args:
        fit: whose closed form it is.
        heads: KV heads of a set.
        together: whether all parts of a layer group are coded as one.

    Raises:
        ConfigError: for too few tiles or queries.
    """
    task, options, sums = fit.task, fit.task.recipe.transform, Sums(fit, heads, together)
    sets, width = task.geometry.kv_heads // heads, task.geometry.head_dim * heads
    fit.harvest_pass(HARVEST, sums)
    sums.gather()
    joint = [m for m in sums.joint if isinstance(m, JointMoments)]
    moments = [m.part(i) for m in joint for i in range(m.parts)]
    require_samples(int(moments[0].count), task.tile, width)
    metrics: list[torch.Tensor] = []
    bases: list[Bases] = []
    for query, of_keys, of_values in zip(sums.queries, moments[::2], moments[1::2], strict=True):
        assert isinstance(query, QueryMoments)
        blocks = query.metric().unflatten(0, (sets, heads))
        by_queries = torch.stack([torch.block_diag(*block) for block in blocks])
        identity = torch.eye(width).to(by_queries).expand_as(by_queries)
        metrics += [by_queries if options.query_metric else identity, identity]
        bases += [of_keys.bases(by_queries if options.query_metric else None).single(), of_values.bases().single()]

    def coefficients(use: Use) -> None:
        def of_group(number: int, layers: Sequence[LayerTiles]) -> None:
            for i, layer in zip(fit.groups[number], layers, strict=True):
                for part, x in enumerate(layer):
                    use(2 * i + part, merge_heads(x.float(), heads))

        fit.each_tiles("variances of their coefficients", of_group)

    sources = measured(fit, bases, coefficients)
    return ClosedForm(sources, moments, joint, metrics, [bank.bank() * sums.scale for bank in sums.banks])


def measured(fit: Fit, bases: Sequence[Bases], tiles: EachTiles) -> list[CodingSource]:
    """Sources with the variances and extremes of their coefficients in given bases, over all ranks."""
    sizes = [(*b.tokens.shape[:2], b.channels_in.shape[2]) for b in bases]
    moments = [CoefficientMoments(*size).to(b.tokens.device) for size, b in zip(sizes, bases, strict=True)]
    extremes = [Extremes(*size).to(b.tokens.device) for size, b in zip(sizes, bases, strict=True)]

    def add(number: int, x_ESTW: torch.Tensor) -> None:
        coefficients = bases[number].coefficients(x_ESTW)
        moments[number].add(coefficients)
        extremes[number].add(coefficients)

    tiles(add)
    for sums, ends in zip(moments, extremes, strict=True):
        fit.reduce(sums)
        fit.reduce(ends, greatest=True)
    return [CodingSource(b, c, e) for b, c, e in zip(bases, moments, extremes, strict=True)]


def sensitivities(fit: Fit, sources: Sequence[CodingSource], budget: BitBudget, heads: int) -> list[torch.Tensor]:
    """By how much an error of energy one in the sets of heads [S] of a layer's source raises the error of attention's
    output, relative to its energy.

    Measured source by source: coded alone, at the budget's mean rate, under the queries that really read it.
    """
    task, sets = fit.task, len(sources[0].cells)
    code_bytes = int(min(task.recipe.element_bits, _PROBE) * budget.elements(1) / 8)
    probes = [allocate([source.cells], code_bytes)[0] for source in sources]
    codecs = transform_layers(
        [s.transform(w, heads, task.geometry.head_dim) for s, w in zip(sources, probes, strict=True)]
    )
    sums = _OutputErrors(len(sources), sets).to(task.model.device)

    def visit(number: int, layers: list[LayerHarvest]) -> None:
        for i, layer in zip(fit.groups[number], layers, strict=True):
            truth = full_output(layer)
            for source, keys in ((2 * i, True), (2 * i + 1, False)):
                segment = read_back(codecs[i], layer, keys=keys, values=not keys)
                errors, energy = error_and_energy(layer, decoded(segment), truth, sets)
                sums.errors[source] += errors.to(sums.errors.device)
                sums.energy[source] += energy.to(sums.energy.device)

    with torch.no_grad():
        for batch in fit.batches(task.recipe.transform.probe_batches, PROBE):
            fit.stream(batch, visit)
    fit.reduce(sums)
    lost = [
        (source.cells.cpu() * distortion(probe)).sum((1, 2)).clamp_min(1e-12)
        for source, probe in zip(sources, probes, strict=True)
    ]
    return [error.cpu() / left for error, left in zip(sums.errors / sums.energy[:, None], lost, strict=True)]


def transform_layers(
    transforms: Sequence[Transform], banks: Sequence[TokenWeighting | None] | None = None
) -> list[TransformLayer]:
    """Layers of transforms of their keys and their values in turn, with each layer's query bank if there are any."""
    pairs = zip(transforms[::2], transforms[1::2], banks or [None] * (len(transforms) // 2), strict=True)
    return [TransformLayer(TransformKeys(k), TransformValues(v), bank) for k, v, bank in pairs]


def read_back(codec: TransformLayer, layer: LayerHarvest, *, keys: bool = True, values: bool = True) -> Segment:
    """A layer's tiles with its keys or values coded, or both, as reading the codes would give them; differentiable in
    the codec."""
    key_part, value_part = KeyPart(layer.keys), ValuePart(layer.values)
    weights = None if codec.readers is None else codec.readers(layer.keys.float())
    if keys:
        transform = codec.keys.transform
        key_part = codec.keys.part(coded(transform, transform.coefficients(layer.keys.float()), weights))
    if values:
        transform = codec.values.transform
        value_part = codec.values.part(coded(transform, transform.coefficients(layer.values.float()), weights))
    return Segment(owner=layer.owner, frame=layer.frame, **key_part._asdict(), **value_part._asdict())


def require_samples(tiles: int, tile: int, width: int) -> None:
    """Raises ConfigError where the tiles are too few for the bases to be more than these tiles' own.

    Args:
        tiles: their number.
        tile: tokens of each.
        width: channels of a set of KV heads.
    """
    needed = -(-2 * tile // width) * 8
    if tiles < needed:
        raise ConfigError(
            f"{tiles} tiles are too few for stable bases of {tile} tokens: at least {needed} are needed. Give more"
            " questions (more rows, --data.size, a lower --held_out), look at more of them (--moment_batches), or"
            " choose a smaller --codec.tile."
        )


class _OutputErrors(nn.Module):
    """Errors of the outputs under each source's code, by set of heads, and the outputs' energies, over batches."""

    errors: torch.Tensor
    energy: torch.Tensor

    def __init__(self, sources: int, sets: int) -> None:
        super().__init__()
        self.register_buffer("errors", torch.zeros(sources, sets, dtype=torch.float64))
        self.register_buffer("energy", torch.zeros(sources, dtype=torch.float64))
