"""Cross-layer transform code: one code for the keys and values of a group of neighbouring layers; each layer reads all
of it.

Neighbouring layers, and the keys and values of one layer, are projections of similar residual streams, so their
coefficients are correlated. Coding them jointly stores the common part once: half of the bits on the demo VLM, little
on smol-vlm (docs/results.md; `kvcapsule analyze` predicts it). For one head group and one tile, with X_p [T, D] the
keys (in the tile's canonical frame) or the values of one layer of the layer group (P = 2 x layers parts of D channels,
the head group's heads concatenated):

    stored  codes of   C = A (sum over parts of X_p P_p)     A [M, T] along tokens, P_p [D, C]     encoder
    read               X_p^ = A' C^ P'_p^T                   A' [T, M], P'_p [D, C]                decoder

As in kvcapsule.codec.transform attention reads C^ itself: A' is score map and value map of every layer, P'_p the map of
a layer's query or of its output. Cost: every layer reads the coefficients of the full layer group twice (as keys and as
values), so a decode step reads and multiplies 2 x layers times its share. The code saves memory, not reading.

The encoder is a sum over the layers. Until the group's last layer has run, one sum [T, C] per tile is held instead of
the layers' keys and values.

Sharing factors of keys or values across layers: xKV (arXiv 2503.18893), low-rank channels of text. Coding keys and
values of all layers as one source, with the token axis and few-bit cells, is this project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..segments.coefficient_rows import CodedRows
from ..vlm.geometry import KVGeometry
from .base import Encoded, KeyPart, LayerGroupCodec, LayerGroupEncoding, ValuePart
from .coefficient_transform import CellTransform, CoefficientCodecConfig, merge_heads, split_heads
from .noise_shaping import TokenWeighting, token_weighting


class CrossLayerTransform(CellTransform):
    """Transform code of a layer group: encoder, decoder and coding. The parts are the keys and the values of its first
    layer, of its second, and so on."""

    def __init__(
        self, *, layers: int, head_groups: int, heads: int, tile: int, dim: int, rows: int, channels: int
    ) -> None:
        super().__init__(head_groups=head_groups, heads=heads, tile=tile, rows=rows, channels=channels)
        self.channels_in = nn.Parameter(torch.zeros(2 * layers, head_groups, heads * dim, channels))
        self.channels_out = nn.Parameter(torch.zeros(2 * layers, head_groups, heads * dim, channels))

    def across(self, index: int, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> torch.Tensor:
        """Contribution of layer `index` in the layer group to sums along channels, [E, S, T, C], in fp32 or better."""
        work = torch.promote_types(k_EHTD.dtype, torch.float32)
        parts = zip((k_EHTD, v_EHTD), self.channels_in[2 * index : 2 * index + 2], strict=True)
        keys, values = (merge_heads(x.to(work), self.heads) @ channels.to(work) for x, channels in parts)
        added: torch.Tensor = keys + values
        return added

    def coefficients(self, sums_ESTC: torch.Tensor) -> torch.Tensor:
        """Coefficients [E, S, M, C] from the sums over all layers."""
        rows: torch.Tensor = self.tokens_in.to(sums_ESTC.dtype) @ sums_ESTC
        return rows

    def encoded(self, index: int, rows: CodedRows | torch.Tensor) -> Encoded:
        """Coefficient rows with the maps by which layer `index` of the layer group reads its keys and its values."""
        key_map, value_map = (
            split_heads(channels, self.heads) for channels in self.channels_out[2 * index : 2 * index + 2]
        )
        keys = KeyPart(rows, score_map=self.tokens_out, q_map=key_map)
        return Encoded(keys, ValuePart(rows, value_map=self.tokens_out, out_map=value_map.transpose(-1, -2)))


class CrossLayerCodec(LayerGroupCodec):
    """Codec of a layer group: a transform code, with token weights for noise shaping or without."""

    borrows_tiles = True

    def __init__(self, transform: CrossLayerTransform, weighting: TokenWeighting | None) -> None:
        super().__init__()
        self.transform = transform
        self.readers = weighting  # The name is that of its tensors in capsule files.

    def start(self) -> "_Encoding":
        return _Encoding(self.transform, self.readers)


class _Encoding(LayerGroupEncoding):
    def __init__(self, transform: CrossLayerTransform, weighting: TokenWeighting | None) -> None:
        self.transform, self.weighting = transform, weighting
        self.sums: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None

    def add(self, index: int, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> None:
        if self.sums is not None and self.sums.device != k_EHTD.device:
            raise ConfigError(
                f"layers of one layer group lie on {self.sums.device} and {k_EHTD.device}: keep them on one device"
                " (device_map), or train a capsule of the transform family, which codes every layer separately."
            )
        added = self.transform.across(index, k_EHTD, v_EHTD)
        self.sums = added if self.sums is None else added.add_(self.sums)
        if self.weighting is not None:
            weights = self.weighting(k_EHTD, index)
            self.weights = weights if self.weights is None else weights.add_(self.weights)

    def finish(self, indices: Sequence[int]) -> list[Encoded]:
        assert self.sums is not None
        weights = None if self.weights is None else self.weights / len(indices)
        rows = CodedRows.encode(
            self.transform.shaped(self.transform.coefficients(self.sums), weights), self.transform.coding()
        )
        return [self.transform.encoded(index, rows) for index in indices]


@dataclass(frozen=True)
class CrossLayerConfig(CoefficientCodecConfig):
    """Settings of a cross-layer transform code."""

    joint_layers: int = 1
    """Layers per layer group; the last group may have fewer."""
    rows: Sequence[int] = ()
    """Token components per layer group; multiples of 8."""
    channels: Sequence[int] = ()
    """Channels of the coefficients per layer group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.joint_layers < 1:
            raise ConfigError(f"joint_layers {self.joint_layers}: a layer group has at least 1 layer.")
        self.check_sizes("rows", "channels")

    @property
    def layer_group(self) -> int:
        return self.joint_layers

    def depths(self, geometry: KVGeometry) -> list[int]:
        """Number of layers in each layer group."""
        layers = len(geometry.capsule_layers)
        return [min(self.joint_layers, layers - first) for first in range(0, layers, self.joint_layers)]

    def build(self, geometry: KVGeometry, layer: int) -> CrossLayerCodec:
        depths, group = self.depths(geometry), layer // self.joint_layers
        for name in ("rows", "channels"):
            if len(getattr(self, name)) != len(depths):
                raise ConfigError(
                    f"{len(getattr(self, name))} {name} for {len(depths)} layer groups: give one for each group."
                )
        transform = CrossLayerTransform(
            layers=depths[group],
            head_groups=self.head_groups(geometry),
            heads=self.joint_heads,
            tile=self.tile,
            dim=geometry.head_dim,
            rows=self.rows[group],
            channels=self.channels[group],
        )
        return CrossLayerCodec(transform, token_weighting(geometry, depths[group], self.readers, self.joint_heads))
