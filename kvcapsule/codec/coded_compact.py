"""Coded compact capsules: a compact tile (kvcapsule.codec.compact) whose keys and values are stored in few bits.

For one layer, one KV head and one tile, with the kept keys K [M, D] and refit values V [M, D]:

    keys     Y = K E_k [M, Ck], quantised channel by channel: attention reads Y^ with the query map q D_k
    bias     refit to the keys as they are read, in one byte each
    values   refit to keys and bias as they are read; Z = V E_v [M, Cv], quantised row after row, each row making up for
             the errors of those before it; attention reads Z^ D_v

E_k and D_k are inverse to each other on Ck directions: the principal axes of the keys in the metric of the queries that
read them. E_v and D_v are those of the values. The C directions and the bits of each (reverse water-filling) are
parameters of the capsule. An image stores codes, and two bytes for each channel's scale and minimum
(kvcapsule.segments.mixed_width_rows): kept tokens are the outliers of a tile, so the grid follows each image.

Approximations: those of compact; the metrics and the bits are the same for all images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..methods.ratios import retained
from ..segments.mixed_width_rows import MixedWidthRows, WidthForm
from ..segments.segment import BIAS_UNIT
from ..vlm.geometry import KVGeometry
from .attention_matching import gather_rows
from .base import Encoded, KeyPart, LayerCodec, ValuePart
from .checked_tensors import CheckedTensors, check_positive, check_widths
from .compact import Block, CompactConfig, CompactLayer
from .refit import (
    assigned_shares,
    attention_of_read_keys,
    fit_bias,
    full_outputs,
    refit_values,
)
from .row_rounding import codes_in_metric


class RowCoding(NamedTuple):
    """How the keys or the values of a layer are coded."""

    into: torch.Tensor
    """[H, D, C]: rows to channels."""
    out: torch.Tensor
    """[H, D, C]: channels back to rows, x = y out^T."""
    form: WidthForm

    def heads(self, heads: slice) -> "RowCoding":
        """Of some heads."""
        return RowCoding(self.into[heads], self.out[heads], self.form.heads(heads))


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

    def __init__(self, heads: int, dim: int, stored: int, channels: tuple[int, int], config: CompactConfig) -> None:
        """channels: of the stored keys and values."""
        super().__init__(heads, dim, stored, config)
        for part, count in zip(("key", "value"), channels, strict=True):
            self.register_buffer(f"{part}_in", torch.zeros(heads, dim, count))
            self.register_buffer(f"{part}_out", torch.zeros(heads, dim, count))
            self.register_buffer(f"{part}_widths", torch.ones(count, dtype=torch.uint8))
            self.register_buffer(f"{part}_unit", torch.ones(heads, count))
            self.register_buffer(f"{part}_centre", torch.zeros(heads, count))
        self._forms: dict[str, tuple[int, WidthForm]] = {}

    def check_tensors(self) -> None:
        for part in ("key", "value"):
            widths = self.get_buffer(f"{part}_widths")
            check_widths(f"{part}_widths", widths)
            check_positive(f"{part}_widths", widths)
            check_positive(f"{part}_unit", self.get_buffer(f"{part}_unit"))

    def coding(self, part: str) -> RowCoding:
        """How "key" or "value" rows are coded."""
        into, out, *form = (self.get_buffer(f"{part}_{name}") for name in ("in", "out", "widths", "unit", "centre"))
        return RowCoding(into, out, self._form(part, *form))

    def _form(self, part: str, widths: torch.Tensor, unit: torch.Tensor, centre: torch.Tensor) -> WidthForm:
        """The form of the rows, kept with what it found out of the widths until tensors are replaced (loaded, moved,
        cast) or the widths written to: an accelerator's are read once."""
        version = 0 if widths.is_inference() else widths._version
        known = self._forms.get(part)
        if known is not None and known[0] == version:
            form = known[1]
            if form.widths is widths and form.unit is unit and form.centre is centre:
                return form
        form = WidthForm(widths, unit, centre)
        self._forms[part] = version, form
        return form

    def set_codings(self, keys: RowCoding, values: RowCoding) -> None:
        """Copy how keys and values are coded."""
        for part, coding in (("key", keys), ("value", values)):
            for name, tensor in (("in", coding.into), ("out", coding.out), *coding.form.named()):
                self.get_buffer(f"{part}_{name}").copy_(tensor)

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        return self.encode_with(k_EHTD, v_EHTD, [(self.coding("key"), self.coding("value"))])[0]

    def encode_with(
        self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, codings: Sequence[tuple[RowCoding, RowCoding]]
    ) -> list[Encoded]:
        """The tiles with each of several codings of the keys and the values of the same kept tokens, in the codings'
        order.

        Args:
            k_EHTD: keys, in the frame of the bank's queries.
            v_EHTD: values.
            codings: of the keys and of the values.

        Raises:
            RuntimeError: if the query bank is empty.
        """
        stored: list[list[torch.Tensor]] = [[] for _ in codings]
        for block in self.blocks(k_EHTD, v_EHTD):
            target = self._target(block)
            for outs, pair in zip(stored, codings, strict=True):
                parts = self._coded(block, target, *(coding.heads(block.at[1]) for coding in pair))
                outs += [] if outs else [part.new_empty(*k_EHTD.shape[:2], *part.shape[2:]) for part in parts]
                for out, part in zip(outs, parts, strict=True):
                    out[block.at] = part
        return [self._encoded(outs, *pair, k_EHTD.dtype) for outs, pair in zip(stored, codings, strict=True)]

    def _encoded(
        self, parts: Sequence[torch.Tensor], keys: RowCoding, values: RowCoding, dtype: torch.dtype
    ) -> Encoded:
        """Of what `_coded` returns."""
        key_codes, key_side, value_codes, value_side, bias = parts
        q_map, out_map = keys.out.to(dtype), values.out.to(dtype).transpose(1, 2)
        return Encoded(
            KeyPart(MixedWidthRows(key_codes, key_side, self.stored, keys.form), q_map=q_map),
            ValuePart(MixedWidthRows(value_codes, value_side, self.stored, values.form), out_map=out_map),
            bias,
        )

    def _target(self, block: Block) -> Target:
        kept, shared = block.choice
        rows = gather_rows(block.reading.attention, kept)
        return Target(
            gather_rows(block.keys, kept).to(rows.dtype),
            assigned_shares(block.reading, rows, kept, shared),
            full_outputs(block.reading, block.values),
        )

    def _coded(
        self, block: Block, target: Target, key_coding: RowCoding, value_coding: RowCoding
    ) -> tuple[torch.Tensor, ...]:
        """Codes and side bytes of the keys, then of the values, and the bias [E, H, M] int8, of a block."""
        reading, work = block.reading, target.share.dtype
        rows = target.keys @ key_coding.into[:, None].to(work)
        keys = MixedWidthRows.encode(rows.transpose(0, 1), key_coding.form)
        queries = reading.queries @ key_coding.out[:, None].to(work)
        attention = attention_of_read_keys(reading, keys.read(work).transpose(0, 1) @ queries.transpose(-1, -2))
        bias = (fit_bias(attention, target.share) / BIAS_UNIT).round().clamp(-128, 127)
        weights = (attention.scores + (bias * BIAS_UNIT)[..., None]).softmax(-2)
        refit = refit_values(weights, target.share, block.values, weights @ target.outputs, self.ridge)
        rows = (refit.values @ value_coding.into[:, None].to(work)).transpose(0, 1)
        side = value_coding.form.side(rows)
        codes = codes_in_metric(rows, refit.gram.transpose(0, 1), value_coding.form.grid(side, work))
        values = MixedWidthRows.of_codes(codes.to(torch.uint8), side, value_coding.form)
        return *keys.tensors(), *values.tensors(), bias.to(torch.int8).transpose(0, 1)


@dataclass(frozen=True)
class CodedCompactConfig(CompactConfig):
    """Settings of a coded compact codec."""

    key_channels: Sequence[int] = ()
    """Stored channels of the keys per layer."""
    value_channels: Sequence[int] = ()
    """Stored channels of the values per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_bits:
            raise ConfigError(
                f"latent_bits {self.latent_bits}: rows of coded-compact have bits of their own; leave latent_bits out."
            )
        if wrong := [count for count in chain(self.key_channels, self.value_channels) if count < 1]:
            raise ConfigError(f"key_channels and value_channels hold {wrong[0]}: a layer stores at least 1 channel.")

    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec:
        layers = len(geometry.capsule_layers)
        for name in ("ratios", "key_channels", "value_channels"):
            if len(getattr(self, name)) != layers:
                raise ConfigError(
                    f"{name} holds {len(getattr(self, name))} numbers for {layers} layers: give one for each."
                )
        channels = self.key_channels[layer], self.value_channels[layer]
        if max(channels) > geometry.head_dim:
            raise ConfigError(
                f"{max(channels)} stored channels in layer {layer}: a head has {geometry.head_dim}, so at most as many."
            )
        rows = retained(self.ratios[layer], self.tile)
        return CodedCompactLayer(geometry.kv_heads, geometry.head_dim, rows, channels, self)
