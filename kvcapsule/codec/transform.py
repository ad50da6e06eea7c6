"""Transform code: a separable linear transform of each tile, then few-bit coefficients (rate-distortion coding that
attention can read).

For one layer, one set of KV heads and one tile X [T, D] of keys (in the tile's canonical frame) or of values, the set's
heads side by side (D channels in all):

    stored  codes of   C = A X P           A [M, T] along tokens, P [D, C] along channels      encoder
    read               X^ = A' C^ P'^T     A' [T, M], P' [D, C]                                decoder

Decoders are linear along both axes, so attention reads C^ itself: A' is the score map (or value map), each head's part
of P' the map of its query (or of its output). Heads of one layer see the same tokens, and what they have in common is
stored once. The widths of the coefficients follow reverse water-filling of what their errors do to the answers' logits
(kvcapsule.training.fisher, allocation); the codes of a tile are chosen together (kvcapsule.codec.noise_shaping); cells
and bytes are laid out as kvcapsule.segments.coefficient_rows says.

Transform coding with reverse water-filling is the textbook's (Goyal, IEEE Signal Processing Magazine, 2001); KVTC
(arXiv 2511.01815) and SVDq (arXiv 2502.15304) code the channels of text KV with it. The token axis, reading without
expansion, and the metric of the logits are this project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..segments.bit_packing import GROUP
from ..segments.coefficient_rows import CodedRows, Coding
from ..vlm.geometry import KVGeometry
from .base import CodecConfig, Encoded, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart
from .noise_shaping import Readers, check_readers, shaped, shaping_macs


class CellTransform(nn.Module):
    """What every transform code has: a basis along tokens, the coding of its coefficients, and the mean tile.

    S sets of `heads` KV heads each; M rows (a multiple of 8) and C channels are those with at least one coded cell. The
    encoder and the decoder begin as each other's inverses and are trained apart.
    """

    channels_out: nn.Parameter
    """Of the decoder; subclasses make it beside channels_in."""
    widths: torch.Tensor

    def __init__(self, sets: int, heads: int, tile: int, rows: int, channels: int) -> None:
        super().__init__()
        groups = rows // GROUP
        self.heads = heads
        self.tokens_in = nn.Parameter(torch.zeros(sets, rows, tile))
        self.tokens_out = nn.Parameter(torch.zeros(sets, tile, rows))
        self.offset = nn.Parameter(torch.zeros(sets, rows, channels))
        self.step = nn.Parameter(torch.ones(sets, groups, channels))
        self.register_buffer("widths", torch.zeros(sets, groups, channels, dtype=torch.uint8))
        self._coding: Coding | None = None
        self._coded_widths = 0

    def coding(self) -> Coding:
        """Made once, so that its layout is, too; anew where the parameters are others (loaded, moved, cast) or the
        widths written to."""
        known, version = self._coding, 0 if self.widths.is_inference() else self.widths._version
        same = (
            known is not None
            and known.widths is self.widths
            and known.step is self.step
            and known.offset is self.offset
        )
        if known is None or not same or version != self._coded_widths:
            known = Coding(self.widths, self.step, self.offset, self.heads)
            self._coding, self._coded_widths = known, version
        return known

    def shaped(self, coefficients_ESMC: torch.Tensor, weights_EST: torch.Tensor | None) -> torch.Tensor:
        """The coefficients to be rounded where tokens weigh unlike (see `shaping`); None: as they are."""
        return (
            coefficients_ESMC
            if weights_EST is None
            else shaped(coefficients_ESMC, self.tokens_out, weights_EST, self.coding())
        )

    def decoder_bytes(self) -> int:
        """Bytes of all that reading needs, in the present precision."""
        return sum(t.nbytes for t in (self.tokens_out, self.channels_out, self.offset, self.step, self.widths))


class Transform(CellTransform):
    """Encoder, decoder and coding of the keys or of the values of one layer."""

    def __init__(self, sets: int, heads: int, tile: int, dim: int, rows: int, channels: int) -> None:
        super().__init__(sets, heads, tile, rows, channels)
        self.channels_in = nn.Parameter(torch.zeros(sets, heads * dim, channels))
        self.channels_out = nn.Parameter(torch.zeros(sets, heads * dim, channels))

    def coefficients(self, x_EHTD: torch.Tensor) -> torch.Tensor:
        """[E, S, M, C], in fp32 or better."""
        work = torch.promote_types(x_EHTD.dtype, torch.float32)
        rows: torch.Tensor = (
            self.tokens_in.to(work) @ side_by_side(x_EHTD.to(work), self.heads) @ self.channels_in.to(work)
        )
        return rows

    def head_maps(self) -> torch.Tensor:
        """channels_out of each KV head, [H, D, C]."""
        return by_head(self.channels_out, self.heads)

    def encode(self, x_EHTD: torch.Tensor, weights_EST: torch.Tensor | None = None) -> CodedRows:
        """weights: of the tokens, for each set of heads; None: all alike."""
        return CodedRows.encode(self.shaped(self.coefficients(x_EHTD), weights_EST), self.coding())


def side_by_side(x_EHTD: torch.Tensor, heads: int) -> torch.Tensor:
    """Sets of KV heads as one head of many channels: [E, H, T, D] to [E, H / heads, T, heads * D]."""
    sets: torch.Tensor = x_EHTD.unflatten(1, (-1, heads)).transpose(2, 3)
    return sets.flatten(3)


def by_head(channels_SWC: torch.Tensor, heads: int) -> torch.Tensor:
    """A map of sets of KV heads side by side as one for each head: [S, heads * D, C] to [S * heads, D, C]."""
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
        """Rows of coefficients with the maps that read them."""
        return KeyPart(rows, score_map=self.transform.tokens_out, q_map=self.transform.head_maps())


class TransformValues(ValueCodec):
    """Transform-coded values."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def encode(self, v_EHTD: torch.Tensor, weights_EST: torch.Tensor | None = None) -> ValuePart:
        return self.part(self.transform.encode(v_EHTD, weights_EST))

    def part(self, rows: CodedRows | torch.Tensor) -> ValuePart:
        """Rows of coefficients with the maps that read them."""
        return ValuePart(
            rows, value_map=self.transform.tokens_out, out_map=self.transform.head_maps().transpose(-1, -2)
        )


class TransformLayer(PairCodec):
    """Keys and values of one layer: each coded by itself, with one weight a token for both where there are readers."""

    keys: TransformKeys
    values: TransformValues

    def __init__(self, keys: TransformKeys, values: TransformValues, readers: Readers | None) -> None:
        super().__init__(keys, values)
        self.readers = readers

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        weights = None if self.readers is None else self.readers(k_EHTD)
        return Encoded(self.keys.encode(k_EHTD, weights), self.values.encode(v_EHTD, weights))


@dataclass(frozen=True)
class TransformConfig(CodecConfig):
    """Sizes of a transform code."""

    key_rows: Sequence[int] = ()
    """Token components of the keys, layer by layer; multiples of 8."""
    key_channels: Sequence[int] = ()
    """Channels of the keys' coefficients, layer by layer."""
    value_rows: Sequence[int] = ()
    """Token components of the values, layer by layer; multiples of 8."""
    value_channels: Sequence[int] = ()
    """Channels of the values' coefficients, layer by layer."""
    joint_heads: int = 1
    """KV heads that are coded together as a set; divides their number."""
    bits: float = 0.0
    """Mean bits of codes for one element of the keys and values: for the reader; the widths are among the weights."""
    readers: int = 0
    """Queries of each KV head that tell how much each token matters (see `shaping`); 0: all tokens matter alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_readers(self.readers)
        if self.latent_bits:
            raise ValueError(
                f"latent_bits {self.latent_bits}: the coefficients of a transform code have bits of their own; leave"
                " it 0."
            )
        for name, channels in (("key_channels", self.key_channels), ("value_channels", self.value_channels)):
            if wrong := [c for c in channels if c < 1]:
                raise ValueError(f"{name} {wrong}: at least 1 channel is needed.")
        for name, rows in (("key_rows", self.key_rows), ("value_rows", self.value_rows)):
            if wrong := [r for r in rows if r < 1 or r % GROUP]:
                raise ValueError(f"{name} {wrong}: a cell has {GROUP} rows, so their number is a multiple of {GROUP}.")

    def encode_macs(self, geometry: KVGeometry) -> int:
        """Multiply-adds of encoding one full tile in all layers: both products of `Transform.coefficients`, token axis
        first; shaping."""
        width, sets = geometry.head_dim * self.joint_heads, geometry.kv_heads // self.joint_heads
        sizes = list(zip((*self.key_rows, *self.value_rows), (*self.key_channels, *self.value_channels), strict=True))
        coding = sum(sets * r * width * (self.tile + c) for r, c in sizes)
        if not self.readers:
            return coding
        reading = geometry.layers * geometry.kv_heads * self.readers * self.tile * geometry.head_dim
        return coding + reading + sets * sum(sum(shaping_macs(self.tile, r, c)) for r, c in sizes)

    def build(self, geometry: KVGeometry, layer: int) -> TransformLayer:
        for name in ("key_rows", "key_channels", "value_rows", "value_channels"):
            if len(getattr(self, name)) != geometry.layers:
                raise ValueError(
                    f"{len(getattr(self, name))} {name} for {geometry.layers} layers: give one for each layer."
                )

        if self.joint_heads < 1 or geometry.kv_heads % self.joint_heads:
            raise ValueError(f"joint_heads {self.joint_heads} does not divide {geometry.kv_heads} KV heads into sets.")
        sets = geometry.kv_heads // self.joint_heads

        def transform(rows: Sequence[int], channels: Sequence[int]) -> Transform:
            return Transform(sets, self.joint_heads, self.tile, geometry.head_dim, rows[layer], channels[layer])

        return TransformLayer(
            TransformKeys(transform(self.key_rows, self.key_channels)),
            TransformValues(transform(self.value_rows, self.value_channels)),
            Readers(1, geometry.kv_heads, self.readers, geometry.head_dim, self.joint_heads) if self.readers else None,
        )
