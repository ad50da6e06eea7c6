"""Coded compact capsules: a compact tile (kvcapsule.codec.compact) whose keys and values are stored in few bits.

For one layer, one KV head and one tile, with the kept keys K [M, D] and refit values V [M, D]:

    keys     K, quantised channel by channel: each channel makes up for the errors of those before it, as the queries
             that read them weigh errors (q^T e with second moments E[q q^T] of the query bank)
    bias     refit to the keys as they are read, in one byte each
    values   refit to keys and bias as they are read; Z = V E_v [M, D], quantised row after row, each row making up for
             the errors of those before it; attention reads Z^ D_v

Keys stay in the head's own channels, so that attention needs no map for the queries of each tile. E_v and D_v are
inverse to each other: the principal axes of the values. The bits of each channel of each head (reverse water-filling)
are parameters of the capsule. An image stores codes, and a byte for each channel's scale and minimum
(kvcapsule.segments.mixed_width_rows): kept tokens are the outliers of a tile, so the grid follows each image.

Approximations: those of compact; the metric of the keys and the bits are the same for all images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..segments.mixed_width_rows import WIDEST, MixedWidthRows, WidthForm
from ..segments.segment import BIAS_UNIT
from ..vlm.geometry import KVGeometry
from .attention_matching import gather_rows
from .base import Encoded, KeyPart, LayerCodec, ValuePart
from .checked_tensors import CheckedTensors, check_positive
from .compact import Block, CompactConfig, CompactLayer
from .refit import Refit, assigned_shares, attention_of_read_keys, fit_bias, full_outputs, refit_values
from .row_rounding import ChannelMetric, codes_of_channels, codes_of_rows

PARTS = ("key", "value")
FORM = ("widths", "unit", "centre")
_RIDGE = 1e-3
"""Added to the diagonal of the queries' second moments, relative to its mean: directions that no query of the bank has
are not lost."""


class Codings(NamedTuple):
    """How the keys and the values of a layer are coded."""

    keys: WidthForm
    values: WidthForm
    into: torch.Tensor
    """[H, D, D]: values to channels."""
    out: torch.Tensor
    """[H, D, D]: channels back to values, v = z out."""

    def heads(self, heads: slice) -> "Codings":
        """The codings of some heads."""
        return Codings(self.keys.heads(heads), self.values.heads(heads), self.into[heads], self.out[heads])


class Codes(NamedTuple):
    """The codes of all tiles, filled block by block."""

    codes: torch.Tensor
    """[E, H, M, C] uint8."""
    side: torch.Tensor
    """[E, H, C] uint8: WidthForm.side."""

    @classmethod
    def empty(cls, form: WidthForm, shape: tuple[int, int, int]) -> "Codes":
        """shape: (E, H, M)."""
        channels = form.widths.shape[1]
        return cls(form.widths.new_empty(*shape, channels), form.widths.new_empty(*shape[:2], channels))

    def put(self, at: tuple[slice, slice], coded: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write the codes and grids of some tiles and heads; at: these tiles and heads."""
        for out, part in zip(self, coded, strict=True):
            out[at] = part.to(torch.uint8)

    def rows(self, form: WidthForm) -> MixedWidthRows:
        """The codes packed, as a segment stores them."""
        return MixedWidthRows.of_codes(self.codes, self.side, form)


class CodedKeys(NamedTuple):
    """A block's kept keys in codes, with the biases and values that go with them; heads first, but for the codes."""

    codes: tuple[torch.Tensor, torch.Tensor]
    """As Codes.put takes them."""
    bias: torch.Tensor
    """[H, E, M], in units of BIAS_UNIT."""
    refit: Refit


class Target(NamedTuple):
    """What all codings of a block's kept tokens have in common; heads first, as in Block."""

    keys: torch.Tensor
    """[H, E, M, D]: the kept keys."""
    share: torch.Tensor
    """[H, E, T, M]: assigned_shares, by the attention of the kept keys as they are."""
    outputs: torch.Tensor
    """[H, E, Q, D]: attention's output over the full tile."""


class CodedCompactLayer(CompactLayer, CheckedTensors):
    """Coded compact codec of one layer."""

    value_in: torch.Tensor
    value_out: torch.Tensor

    def __init__(self, heads: int, dim: int, stored: int, config: CompactConfig) -> None:
        super().__init__(heads, dim, stored, config)
        for part in PARTS:
            self.register_buffer(f"{part}_widths", torch.ones(heads, dim, dtype=torch.uint8))
            self.register_buffer(f"{part}_unit", torch.ones(heads, dim))
            self.register_buffer(f"{part}_centre", torch.zeros(heads, dim))
        for name in ("value_in", "value_out"):
            self.register_buffer(name, torch.zeros(heads, dim, dim))
        self._forms: dict[str, tuple[int, WidthForm]] = {}

    def check_tensors(self) -> None:
        for part in PARTS:
            if int(self.get_buffer(f"{part}_widths").max()) > WIDEST:
                raise ConfigError(f"{part}_widths has more than {WIDEST} bits: a channel has 0 to {WIDEST}.")
            check_positive(f"{part}_unit", self.get_buffer(f"{part}_unit"))

    def codings(self) -> Codings:
        """How rows are coded."""
        keys, values = (self._form(part) for part in PARTS)
        return Codings(keys, values, self.value_in, self.value_out)

    def _form(self, part: str) -> WidthForm:
        """The form of the rows, kept with what it found out of the widths until tensors are replaced (loaded, moved,
        cast) or the widths written to: an accelerator's are read once."""
        widths, unit, centre = (self.get_buffer(f"{part}_{name}") for name in FORM)
        version = 0 if widths.is_inference() else widths._version
        known = self._forms.get(part)
        if known is not None and known[0] == version:
            form = known[1]
            if form.widths is widths and form.unit is unit and form.centre is centre:
                return form
        form = WidthForm(widths, unit, centre)
        self._forms[part] = version, form
        return form

    def set_codings(self, codings: Codings) -> None:
        """Copy how rows are coded."""
        for part, form in zip(PARTS, (codings.keys, codings.values), strict=True):
            for name, tensor in form.named():
                self.get_buffer(f"{part}_{name}").copy_(tensor)
        self.value_in.copy_(codings.into)
        self.value_out.copy_(codings.out)

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        return self.encode_with(k_EHTD, v_EHTD, [self.codings()])[0]

    def encode_with(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, ways: Sequence[Codings]) -> list[Encoded]:
        """The tiles with each of several codings of the same kept tokens, in the codings' order.

        Args:
            k_EHTD: keys, in the frame of the bank's queries.
            v_EHTD: values.
            ways: how rows are coded; where two have one form of the keys, these are coded once.

        Raises:
            RuntimeError: if the query bank is empty.
        """
        metrics = {id(way.keys): self.metric(way.keys, k_EHTD.dtype) for way in ways}
        shape = (*k_EHTD.shape[:2], self.stored)
        stored = [
            (Codes.empty(way.keys, shape), Codes.empty(way.values, shape), way.keys.widths.new_empty(shape).char())
            for way in ways
        ]
        for block in self.blocks(k_EHTD, v_EHTD):
            target, read = self._target(block), dict[int, CodedKeys]()
            for way, (keys, values, bias) in zip(ways, stored, strict=True):
                mine = way.heads(block.at[1])
                if id(way.keys) not in read:
                    read[id(way.keys)] = self._coded_keys(block, target, mine.keys, metrics[id(way.keys)])
                of_keys = read[id(way.keys)]
                keys.put(block.at, of_keys.codes)
                values.put(block.at, _coded_values(of_keys.refit, mine))
                bias[block.at] = of_keys.bias.transpose(0, 1)
        return [
            Encoded(
                KeyPart(keys.rows(way.keys)),
                ValuePart(values.rows(way.values), out_map=way.out.to(k_EHTD.dtype)),
                bias,
            )
            for way, (keys, values, bias) in zip(ways, stored, strict=True)
        ]

    def metric(self, keys: WidthForm, dtype: torch.dtype) -> ChannelMetric:
        """In which keys of this dtype are rounded: second moments of the query bank."""
        queries = self.queries(dtype)
        gram = queries.transpose(1, 2) @ queries
        size = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        gram = gram + _RIDGE * size * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        return ChannelMetric.of(gram, keys.unit.to(gram.dtype) * keys.levels[:, 0].clamp_min(1))

    def _target(self, block: Block) -> Target:
        kept, shared = block.kept
        rows = gather_rows(block.reading.attention, kept)
        return Target(
            gather_rows(block.keys, kept).to(rows.dtype),
            assigned_shares(block.reading, rows, kept, shared),
            full_outputs(block.reading, block.values),
        )

    def _coded_keys(self, block: Block, target: Target, form: WidthForm, metric: ChannelMetric) -> CodedKeys:
        """The keys of a block as they are read, and the biases and values that go with them."""
        reading, work = block.reading, target.share.dtype
        side = form.side(target.keys.transpose(0, 1))
        grid = form.grid(side, work).heads_first()
        codes = codes_of_channels(target.keys, metric.heads(block.at[1]), grid)
        attention = attention_of_read_keys(reading, grid.values(codes) @ reading.queries.transpose(-1, -2))
        bias = (fit_bias(attention, target.share) / BIAS_UNIT).round().clamp(-128, 127)
        weights = (attention.scores + (bias * BIAS_UNIT)[..., None]).softmax(-2)
        refit = refit_values(weights, target.share, block.values, weights @ target.outputs, self.ridge)
        return CodedKeys((codes.transpose(0, 1), side), bias, refit)


def _coded_values(refit: Refit, way: Codings) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and bytes of the grids, as Codes.put takes them."""
    work = refit.values.dtype
    rows = (refit.values @ way.into[:, None].to(work)).transpose(0, 1)
    side = way.values.side(rows)
    return codes_of_rows(rows, refit.gram.transpose(0, 1), way.values.grid(side, work)), side


@dataclass(frozen=True)
class CodedCompactConfig(CompactConfig):
    """Settings of a coded compact codec."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_bits:
            raise ConfigError(
                f"latent_bits {self.latent_bits}: rows of coded-compact have bits of their own; leave latent_bits out."
            )

    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec:
        rows = self.stored_rows(geometry, layer)
        return CodedCompactLayer(geometry.kv_heads, geometry.head_dim, rows, self)
