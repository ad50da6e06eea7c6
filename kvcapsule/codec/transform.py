"""Transform code: a separable linear transform of each tile, then few-bit coefficients (rate-distortion coding that
attention can read).

For one layer, one head group and one tile X [T, D] of keys (in the tile's canonical frame) or of values, with the
group's heads concatenated along the channels (D in all):

    stored  codes of   C = A X P           A [M, T] along tokens, P [D, C] along channels      encoder
    read               X^ = A' C^ P'^T     A' [T, M], P' [D, C]                                decoder

Decoders are linear along both axes, so attention reads C^ itself: A' is the score map (or value map), and each head's
part of P' the map of its query (or of its output). Coding the heads of a group jointly stores redundancy between them
once. Bits are assigned to coefficients by reverse water-filling, in the metric of the answers' logits
(kvcapsule.training.fisher, kvcapsule.codec.bit_allocation); the codes of a tile are chosen jointly
(kvcapsule.codec.noise_shaping); the byte layout is in kvcapsule.segments.coefficient_rows.

Transform coding with reverse water-filling is the textbook's (Goyal, IEEE Signal Processing Magazine, 2001); KVTC
(arXiv 2511.01815) and SVDq (arXiv 2502.15304) code the channels of text KV with it. The token axis, reading without
expansion, and the metric of the logits are this project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..segments.coefficient_rows import CodedRows
from ..vlm.geometry import KVGeometry
from .base import Encoded, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart
from .coefficient_transform import CellTransform, CoefficientCodecConfig, merge_heads, split_heads
from .noise_shaping import TokenWeighting, token_weighting


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


class TransformKeys(KeyCodec):
    """Transform-coded keys."""

    borrows_tiles = True

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

    borrows_tiles = True

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
class TransformConfig(CoefficientCodecConfig):
    """Settings of a transform code."""

    key_rows: Sequence[int] = ()
    """Token components of the keys, layer by layer; multiples of 8."""
    key_channels: Sequence[int] = ()
    """Channels of the keys' coefficients, layer by layer."""
    value_rows: Sequence[int] = ()
    """Token components of the values, layer by layer; multiples of 8."""
    value_channels: Sequence[int] = ()
    """Channels of the values' coefficients, layer by layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("key", "value"):
            self.check_sizes(f"{part}_rows", f"{part}_channels")

    def build(self, geometry: KVGeometry, layer: int) -> TransformLayer:
        layers = len(geometry.capsule_layers)
        for name in ("key_rows", "key_channels", "value_rows", "value_channels"):
            if len(getattr(self, name)) != layers:
                raise ConfigError(f"{len(getattr(self, name))} {name} for {layers} layers: give one for each layer.")
        head_groups = self.head_groups(geometry)

        def transform(rows: Sequence[int], channels: Sequence[int]) -> Transform:
            return Transform(
                head_groups=head_groups,
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
