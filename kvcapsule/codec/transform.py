"""Transform code: a separable linear transform of each tile, then few-bit coefficients (rate-distortion coding that
attention can read).

For one layer, one head group and one tile X [T, D] of keys (in the tile's canonical frame) or of values, with the
group's heads concatenated along the channels (D in all):

    stored  codes of   C = A X P           A [M, T] along tokens, P [D, C] along channels      encoder
    read               X^ = A' C^ P'^T     A' [T, M], P' [D, C]                                decoder

Decoders are linear along both axes, so attention reads C^ itself: A' is the score map (or value map), and each head's
part of P' the map of its query (or of its output). Coding the heads of a group jointly stores redundancy between them
once. Bits are assigned to coefficients by reverse water-filling, in the metric of the answers' logits
(kvcapsule.training.fisher, allocation); the codes of a tile are chosen jointly (kvcapsule.codec.noise_shaping); the
byte layout is in kvcapsule.segments.coefficient_rows.

Transform coding with reverse water-filling is the textbook's (Goyal, IEEE Signal Processing Magazine, 2001); KVTC
(arXiv 2511.01815) and SVDq (arXiv 2502.15304) code the channels of text KV with it. The token axis, reading without
expansion, and the metric of the logits are this project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..segments.bit_packing import GROUP
from ..segments.coefficient_rows import CodedRows, Coding
from ..vlm.geometry import KVGeometry
from .base import CodecConfig, Encoded, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart
from .noise_shaping import TokenWeighting, check_query_bank, shaped, shaping_macs, token_weighting


class CellTransform(nn.Module):
    """Base of transform codes: bases along tokens, and the coding of the coefficients with their mean (`offset`).

    S head groups of `heads` KV heads; M rows (a multiple of 8) and C channels have at least one coded cell. Encoder and
    decoder are initialised as inverses of each other and trained separately. `step` is the scale of a cell's codes.
    """

    channels_out: nn.Parameter
    """Channel basis of the decoder; subclasses create it, and channels_in of the encoder."""
    widths: torch.Tensor

    def __init__(self, *, head_groups: int, heads: int, tile: int, rows: int, channels: int) -> None:
        super().__init__()
        cells = (head_groups, rows // GROUP, channels)
        self.heads = heads
        self.tokens_in = nn.Parameter(torch.zeros(head_groups, rows, tile))
        self.tokens_out = nn.Parameter(torch.zeros(head_groups, tile, rows))
        self.offset = nn.Parameter(torch.zeros(head_groups, rows, channels))
        self.step = nn.Parameter(torch.ones(*cells))
        self.register_buffer("widths", torch.zeros(*cells, dtype=torch.uint8))
        self._coding: Coding | None = None
        self._coded_widths = 0

    def coding(self) -> Coding:
        """The coding of the coefficients. It is cached with its layout, and rebuilt when the parameters were replaced
        (loaded, moved, cast) or the widths written to."""
        known, version = self._coding, 0 if self.widths.is_inference() else self.widths._version
        same = (
            known is not None
            and known.widths is self.widths
            and known.scale is self.step
            and known.offset is self.offset
        )
        if known is None or not same or version != self._coded_widths:
            known = Coding(self.widths, self.step, self.offset, self.heads)
            self._coding, self._coded_widths = known, version
        return known

    def shaped(self, coefficients_ESMC: torch.Tensor, weights_EST: torch.Tensor | None) -> torch.Tensor:
        """Coefficients shifted for noise shaping by token weights [E, S, T]; unchanged without weights."""
        return (
            coefficients_ESMC
            if weights_EST is None
            else shaped(coefficients_ESMC, self.tokens_out, weights_EST, self.coding())
        )

    def decoder_bytes(self) -> int:
        """Bytes of the parameters that reading needs, in their current dtype."""
        return sum(t.nbytes for t in (self.tokens_out, self.channels_out, self.offset, self.step, self.widths))


class Transform(CellTransform):
    """Transform code of the keys or of the values of one layer: encoder, decoder and coding."""

    def __init__(self, *, head_groups: int, heads: int, tile: int, dim: int, rows: int, channels: int) -> None:
        super().__init__(head_groups=head_groups, heads=heads, tile=tile, rows=rows, channels=channels)
        self.channels_in = nn.Parameter(torch.zeros(head_groups, heads * dim, channels))
        self.channels_out = nn.Parameter(torch.zeros(head_groups, heads * dim, channels))

    def coefficients(self, x_EHTD: torch.Tensor) -> torch.Tensor:
        """Coefficients of tiles, [E, S, M, C], in fp32 or better."""
        work = torch.promote_types(x_EHTD.dtype, torch.float32)
        rows: torch.Tensor = (
            self.tokens_in.to(work) @ merge_heads(x_EHTD.to(work), self.heads) @ self.channels_in.to(work)
        )
        return rows

    def head_maps(self) -> torch.Tensor:
        """channels_out per KV head, [H, D, C]."""
        return split_heads(self.channels_out, self.heads)

    def encode(self, x_EHTD: torch.Tensor, weights_EST: torch.Tensor | None = None) -> CodedRows:
        """Code tiles; weights_EST: token weights per head group. None: equal weights."""
        return CodedRows.encode(self.shaped(self.coefficients(x_EHTD), weights_EST), self.coding())


def merge_heads(x_EHTD: torch.Tensor, heads: int) -> torch.Tensor:
    """Concatenate the heads of each head group along the channels: [E, H, T, D] to [E, H / heads, T, heads * D]."""
    groups: torch.Tensor = x_EHTD.unflatten(1, (-1, heads)).transpose(2, 3)
    return groups.flatten(3)


def split_heads(channels_SWC: torch.Tensor, heads: int) -> torch.Tensor:
    """Split maps of head groups into maps of single heads: [S, heads * D, C] to [S * heads, D, C]."""
    maps: torch.Tensor = channels_SWC.unflatten(1, (heads, -1))
    return maps.flatten(0, 1)


class TransformKeys(KeyCodec):
    """Transform-coded keys."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def encode(self, k_EHTD: torch.Tensor, weights_EST: torch.Tensor | None = None) -> KeyPart:
        return self.part(self.transform.encode(k_EHTD, weights_EST))

    def part(self, rows: CodedRows | torch.Tensor) -> KeyPart:
        """Coefficient rows with the maps by which attention reads them."""
        return KeyPart(rows, score_map=self.transform.tokens_out, q_map=self.transform.head_maps())


class TransformValues(ValueCodec):
    """Transform-coded values."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def encode(self, v_EHTD: torch.Tensor, weights_EST: torch.Tensor | None = None) -> ValuePart:
        return self.part(self.transform.encode(v_EHTD, weights_EST))

    def part(self, rows: CodedRows | torch.Tensor) -> ValuePart:
        """Coefficient rows with the maps by which attention reads them."""
        return ValuePart(
            rows, value_map=self.transform.tokens_out, out_map=self.transform.head_maps().transpose(-1, -2)
        )


class TransformLayer(PairCodec):
    """Transform codes of one layer's keys and values, coded separately with common token weights."""

    keys: TransformKeys
    values: TransformValues

    def __init__(self, keys: TransformKeys, values: TransformValues, weighting: TokenWeighting | None) -> None:
        super().__init__(keys, values)
        self.readers = weighting  # The name is that of its tensors in capsule files.

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        weights = None if self.readers is None else self.readers(k_EHTD)
        return Encoded(self.keys.encode(k_EHTD, weights), self.values.encode(v_EHTD, weights))


@dataclass(frozen=True)
class TransformConfig(CodecConfig):
    """Settings of a transform code."""

    key_rows: Sequence[int] = ()
    """Token components of the keys, layer by layer; multiples of 8."""
    key_channels: Sequence[int] = ()
    """Channels of the keys' coefficients, layer by layer."""
    value_rows: Sequence[int] = ()
    """Token components of the values, layer by layer; multiples of 8."""
    value_channels: Sequence[int] = ()
    """Channels of the values' coefficients, layer by layer."""
    joint_heads: int = 1
    """KV heads per head group, which are coded together; divides the number of KV heads."""
    bits: float = 0.0
    """Mean bits of codes per element of keys and values. Information only: the widths are in the weights."""
    readers: int = 0
    """Queries per KV head in the query bank that weights tokens (kvcapsule.codec.noise_shaping); 0: equal weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_query_bank(self.readers)
        if self.latent_bits:
            raise ConfigError(
                f"latent_bits {self.latent_bits}: the coefficients of a transform code have bits of their own; leave"
                " it 0."
            )
        for name, channels in (("key_channels", self.key_channels), ("value_channels", self.value_channels)):
            if wrong := [c for c in channels if c < 1]:
                raise ConfigError(f"{name} {wrong}: at least 1 channel is needed.")
        for name, rows in (("key_rows", self.key_rows), ("value_rows", self.value_rows)):
            if wrong := [r for r in rows if r < 1 or r % GROUP]:
                raise ConfigError(f"{name} {wrong}: a cell has {GROUP} rows, so their number is a multiple of {GROUP}.")

    def encode_macs(self, geometry: KVGeometry) -> int:
        """Multiply-adds of encoding one full tile in all layers: both products of `Transform.coefficients`, token axis
        first, and noise shaping."""
        width, head_groups = geometry.head_dim * self.joint_heads, geometry.kv_heads // self.joint_heads
        sizes = list(zip((*self.key_rows, *self.value_rows), (*self.key_channels, *self.value_channels), strict=True))
        coding = sum(head_groups * r * width * (self.tile + c) for r, c in sizes)
        if not self.readers:
            return coding
        reading = geometry.layers * geometry.kv_heads * self.readers * self.tile * geometry.head_dim
        return coding + reading + head_groups * sum(sum(shaping_macs(self.tile, r, c)) for r, c in sizes)

    def build(self, geometry: KVGeometry, layer: int) -> TransformLayer:
        for name in ("key_rows", "key_channels", "value_rows", "value_channels"):
            if len(getattr(self, name)) != geometry.layers:
                raise ConfigError(
                    f"{len(getattr(self, name))} {name} for {geometry.layers} layers: give one for each layer."
                )

        if self.joint_heads < 1 or geometry.kv_heads % self.joint_heads:
            raise ConfigError(f"joint_heads {self.joint_heads} does not divide {geometry.kv_heads} KV heads into sets.")

        def transform(rows: Sequence[int], channels: Sequence[int]) -> Transform:
            return Transform(
                head_groups=geometry.kv_heads // self.joint_heads,
                heads=self.joint_heads,
                tile=self.tile,
                dim=geometry.head_dim,
                rows=rows[layer],
                channels=channels[layer],
            )

        return TransformLayer(
            TransformKeys(transform(self.key_rows, self.key_channels)),
            TransformValues(transform(self.value_rows, self.value_channels)),
            token_weighting(geometry, 1, self.readers, self.joint_heads),
        )
