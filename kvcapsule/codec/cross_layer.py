"""Cross-layer transform code: one code for the keys and values of a stack of neighbouring layers, each of which reads
all of it.

Layers that follow each other, and the keys and values of one layer, are made from residual streams that differ little,
so their coefficients have something in common, and it need be stored only once: half of the bits on the demo VLM,
little on smol-vlm (docs/results.md; `kvcapsule analyze` predicts it). For one set of KV heads and one tile, with X_p
[T, D] the keys (in the tile's canonical frame) and the values of every layer of the stack, side by side (P = 2 x layers
parts, D channels each for all heads of the set):

    stored  codes of   C = A (sum over parts of X_p P_p)     A [M, T] along tokens, P_p [D, C]     encoder
    read               X_p^ = A' C^ P'_p^T                   A' [T, M], P'_p [D, C]                decoder

As in kvcapsule.codec.transform attention reads C^ itself: A' is score map and value map of every layer, P'_p the map of
a layer's query or of its output. What it costs: a layer reads the coefficients of the whole stack, twice (as keys and
as values), so the bytes and products of a step are 2 x layers times those of its share. It saves memory, not reading.

The encoder is a sum over the layers, so what waits for the stack's last layer are sums [T, C] a tile and not the
layers' keys and values.

Sharing factors of keys or values across layers: xKV (arXiv 2503.18893), low-rank channels of text. Coding keys and
values of all layers as one source, with the token axis and few-bit cells, is this project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..segments.bit_packing import GROUP
from ..segments.coefficient_rows import CodedRows
from ..vlm.geometry import KVGeometry
from .base import CodecConfig, Encoded, KeyPart, StackCodec, StackEncoding, ValuePart
from .noise_shaping import Readers, check_readers, shaping_macs
from .transform import CellTransform, by_head, side_by_side


class CrossLayerTransform(CellTransform):
    """Encoder, decoder and coding of a stack: parts are the keys and the values of its first layer, of its second, and
    so on."""

    def __init__(self, layers: int, sets: int, heads: int, tile: int, dim: int, rows: int, channels: int) -> None:
        super().__init__(sets, heads, tile, rows, channels)
        self.channels_in = nn.Parameter(torch.zeros(2 * layers, sets, heads * dim, channels))
        self.channels_out = nn.Parameter(torch.zeros(2 * layers, sets, heads * dim, channels))

    def across(self, place: int, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> torch.Tensor:
        """What the layer at `place` in the stack adds to the sums along channels, [E, S, T, C], in fp32 or better."""
        work = torch.promote_types(k_EHTD.dtype, torch.float32)
        parts = zip((k_EHTD, v_EHTD), self.channels_in[2 * place : 2 * place + 2], strict=True)
        keys, values = (side_by_side(x.to(work), self.heads) @ channels.to(work) for x, channels in parts)
        added: torch.Tensor = keys + values
        return added

    def coefficients(self, sums_ESTC: torch.Tensor) -> torch.Tensor:
        """[E, S, M, C] of all layers' sums."""
        rows: torch.Tensor = self.tokens_in.to(sums_ESTC.dtype) @ sums_ESTC
        return rows

    def encoded(self, place: int, rows: CodedRows | torch.Tensor) -> Encoded:
        """Rows of coefficients with the maps by which the layer at `place` reads its keys and its values."""
        key_map, value_map = (
            by_head(channels, self.heads) for channels in self.channels_out[2 * place : 2 * place + 2]
        )
        keys = KeyPart(rows, score_map=self.tokens_out, q_map=key_map)
        return Encoded(keys, ValuePart(rows, value_map=self.tokens_out, out_map=value_map.transpose(-1, -2)))


class CrossLayerCodec(StackCodec):
    """The codec of a stack."""

    def __init__(self, transform: CrossLayerTransform, readers: Readers | None) -> None:
        super().__init__()
        self.transform, self.readers = transform, readers

    def start(self) -> "_Encoding":
        return _Encoding(self.transform, self.readers)


class _Encoding(StackEncoding):
    def __init__(self, transform: CrossLayerTransform, readers: Readers | None) -> None:
        self.transform, self.readers = transform, readers
        self.sums: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None

    def add(self, place: int, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> None:
        if self.sums is not None and self.sums.device != k_EHTD.device:
            raise ValueError(
                f"layers of one stack lie on {self.sums.device} and {k_EHTD.device}: keep them on one device"
                " (device_map), or train a capsule of the transform family, whose layers are apart."
            )
        added = self.transform.across(place, k_EHTD, v_EHTD)
        self.sums = added if self.sums is None else added.add_(self.sums)
        if self.readers is not None:
            weights = self.readers(k_EHTD, place)
            self.weights = weights if self.weights is None else weights.add_(self.weights)

    def finish(self, places: Sequence[int]) -> list[Encoded]:
        assert self.sums is not None
        weights = None if self.weights is None else self.weights / len(places)
        rows = CodedRows.encode(
            self.transform.shaped(self.transform.coefficients(self.sums), weights), self.transform.coding()
        )
        return [self.transform.encoded(place, rows) for place in places]


@dataclass(frozen=True)
class CrossLayerConfig(CodecConfig):
    """Sizes of a cross-layer transform code."""

    joint_layers: int = 1
    """Layers of a stack; the last stack may have fewer."""
    joint_heads: int = 1
    """KV heads that are coded together as a set; divides their number."""
    rows: Sequence[int] = ()
    """Token components, stack by stack; multiples of 8."""
    channels: Sequence[int] = ()
    """Channels of the coefficients, stack by stack."""
    bits: float = 0.0
    """Mean bits of codes for one element of the keys and values: for the reader; the widths are among the weights."""
    readers: int = 0
    """Queries of each KV head and layer that tell how much each token matters (see `shaping`); 0: all tokens matter
    alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_readers(self.readers)
        if self.latent_bits:
            raise ValueError(
                f"latent_bits {self.latent_bits}: the coefficients of a transform code have bits of their own; leave"
                " it 0."
            )
        if self.joint_layers < 1:
            raise ValueError(f"joint_layers {self.joint_layers}: a stack has at least 1 layer.")
        if wrong := [c for c in self.channels if c < 1]:
            raise ValueError(f"channels {wrong}: at least 1 channel is needed.")
        if wrong := [r for r in self.rows if r < 1 or r % GROUP]:
            raise ValueError(f"rows {wrong}: a cell has {GROUP} rows, so their number is a multiple of {GROUP}.")

    @property
    def stacked(self) -> int:
        return self.joint_layers

    def encode_macs(self, geometry: KVGeometry) -> int:
        """Multiply-adds of encoding one full tile in all layers: the channels of each layer, then the tokens of each
        stack; shaping."""
        width, sets = geometry.head_dim * self.joint_heads, geometry.kv_heads // self.joint_heads
        sizes = list(zip(self.depths(geometry), self.rows, self.channels, strict=True))
        coding = sum(sets * self.tile * c * (2 * depth * width + r) for depth, r, c in sizes)
        if not self.readers:
            return coding
        reading = geometry.layers * geometry.kv_heads * self.readers * self.tile * geometry.head_dim
        return coding + reading + sets * sum(sum(shaping_macs(self.tile, r, c)) for _, r, c in sizes)

    def depths(self, geometry: KVGeometry) -> list[int]:
        """Layers of each stack."""
        return [
            min(self.joint_layers, geometry.layers - first) for first in range(0, geometry.layers, self.joint_layers)
        ]

    def build(self, geometry: KVGeometry, layer: int) -> CrossLayerCodec:
        depths, stack = self.depths(geometry), layer // self.joint_layers
        for name in ("rows", "channels"):
            if len(getattr(self, name)) != len(depths):
                raise ValueError(
                    f"{len(getattr(self, name))} {name} for {len(depths)} stacks of layers: give one for each stack."
                )
        if self.joint_heads < 1 or geometry.kv_heads % self.joint_heads:
            raise ValueError(f"joint_heads {self.joint_heads} does not divide {geometry.kv_heads} KV heads into sets.")
        sizes = (self.tile, geometry.head_dim, self.rows[stack], self.channels[stack])
        transform = CrossLayerTransform(depths[stack], geometry.kv_heads // self.joint_heads, self.joint_heads, *sizes)
        of_readers = (depths[stack], geometry.kv_heads, self.readers, geometry.head_dim, self.joint_heads)
        return CrossLayerCodec(transform, Readers(*of_readers) if self.readers else None)
