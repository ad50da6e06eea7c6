"""KVCapsule (arXiv 2605.16439): keys by a learned static subset of tokens, values by PCA along the token axis.

For one layer and one tile of T visual tokens, with M the set of retained tokens (|M| = m; learned, and the same for all
heads, images and prompts):

    keys    stored  K_M                 [m, D]      read   K^ = theta K_M            theta [T, m] per KV head
    values  stored  C = U (V - 1 mu^T)  [m', D]     read   V^ = U^T C + 1 mu^T       U [m', T] and mu [D] per KV head

Attention absorbs a linear theta: the scores of all T tokens are theta times the scores of the retained tokens, which
commutes with RoPE. The paper's text describes a two-layer MLP along the token axis in place of theta, but its fused
kernel uses one matrix, so both are offered. The MLP does not commute: it rebuilds the full keys of the tile at every
read, which takes more memory traffic than no compression. It is here for comparison only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..field_checks import check_least
from ..methods.ratios import check_ratio, retained
from ..vlm.geometry import KVGeometry
from .base import CodecConfig, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart
from .checked_tensors import CheckedTensors, check_places


class RetainedKeys(KeyCodec, CheckedTensors):
    """Key codec with retained rows `kept` [m] and a linear reconstruction `theta` [H, T, m]."""

    borrows_tiles = True
    kept: torch.Tensor

    def __init__(self, heads: int, tile: int, stored: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(stored))
        self.theta = nn.Parameter(torch.zeros(heads, tile, stored))

    def check_tensors(self) -> None:
        check_places("kept", self.kept, self.theta.shape[1])

    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        return KeyPart(k_EHTD[:, :, self.kept], score_map=self.theta.to(k_EHTD.dtype))


class MlpKeys(KeyCodec, CheckedTensors):
    """Key codec with retained rows `kept` [m] and a two-layer MLP along tokens, m -> hidden -> T, per KV head. Rebuilds
    the full keys at every read."""

    borrows_tiles = True
    kept: torch.Tensor

    def __init__(self, heads: int, tile: int, stored: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(stored))
        self.inner = nn.Parameter(torch.zeros(heads, hidden, stored))
        self.inner_bias = nn.Parameter(torch.zeros(heads, hidden, 1))
        self.outer = nn.Parameter(torch.zeros(heads, tile, hidden))
        self.outer_bias = nn.Parameter(torch.zeros(heads, tile, 1))

    def check_tensors(self) -> None:
        check_places("kept", self.kept, self.outer.shape[1])

    def decode(self, k_EHMD: torch.Tensor) -> torch.Tensor:
        """Expand retained keys [E, H, m, D] to all tokens, [E, H, T, D]."""
        inner, inner_bias, outer, outer_bias = (
            p.to(k_EHMD.dtype) for p in (self.inner, self.inner_bias, self.outer, self.outer_bias)
        )
        return outer @ nn.functional.gelu(inner @ k_EHMD + inner_bias) + outer_bias

    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        return KeyPart(MlpRows(k_EHTD[:, :, self.kept], self))


class MlpRows:
    """Packed rows of retained keys, which an MLP expands to the full tile at every read."""

    def __init__(self, rows: torch.Tensor, codec: MlpKeys) -> None:
        self.rows, self.codec = rows, codec

    @property
    def shape(self) -> torch.Size:
        entries, heads, _, dim = self.rows.shape
        return torch.Size((entries, heads, self.codec.outer.shape[1], dim))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        return self.codec.decode(self.rows.to(dtype))

    def select(self, index: torch.Tensor) -> "MlpRows":
        return MlpRows(self.rows[index], self.codec)

    def to(self, device: torch.device | str) -> "MlpRows":
        return MlpRows(self.rows.to(device), self.codec)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.rows,)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "MlpRows":
        """See kvcapsule.segments.storable_rows."""
        (rows,) = tensors
        return MlpRows(rows, self.codec)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.codec.parameters())


class PcaValues(ValueCodec):
    """Value codec by PCA along the token axis: basis U [H, m, T], mean mu [H, D] over samples and tokens.

    The closed-form U has orthonormal rows (the paper's values). Training with train_values changes U, which is then no
    longer a PCA basis.
    """

    borrows_tiles = True
    mean: torch.Tensor

    def __init__(self, heads: int, tile: int, stored: int, dim: int) -> None:
        super().__init__()
        # Solved in closed form; requires a gradient only in training runs that change it.
        self.basis = nn.Parameter(torch.zeros(heads, stored, tile), requires_grad=False)
        self.register_buffer("mean", torch.zeros(heads, dim))

    def encode(self, v_EHTD: torch.Tensor) -> ValuePart:
        basis, mean = self.basis.to(v_EHTD.dtype), self.mean.to(v_EHTD.dtype)
        # Heads first, as in memory: a batched product with tiles first would copy them.
        stored_HEMD = basis[:, None] @ (v_EHTD - mean[:, None]).transpose(0, 1)
        return ValuePart(stored_HEMD.transpose(0, 1).contiguous(), value_map=basis.transpose(-1, -2), value_mean=mean)


@dataclass(frozen=True)
class KVCapsuleConfig(CodecConfig):
    """Settings of a KVCapsule codec."""

    key_ratios: Sequence[float] = ()
    """Retention ratio of the keys per layer."""
    value_ratios: Sequence[float] = ()
    """Retention ratio of the values per layer."""
    key_decoder: str = "linear"
    """"linear" (absorbed by attention) or "mlp" (the paper's two layers; builds the full keys at every read)."""
    hidden: int = 256
    """Width of the MLP's inner layer, along tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"hidden": 1})
        if self.key_decoder not in ("linear", "mlp"):
            raise ConfigError(f"key_decoder {self.key_decoder!r} is neither 'linear' nor 'mlp'.")
        if self.key_decoder == "mlp" and not self.canonical_frame:
            raise ConfigError("the MLP key decoder does not commute with RoPE: it needs canonical_frame=True.")
        if self.key_decoder == "mlp" and self.latent_bits:
            raise ConfigError(
                "latent_bits: the MLP key decoder reads its rows as they are; use key_decoder 'linear', or leave it 0."
            )
        for name, ratios in (("key", self.key_ratios), ("value", self.value_ratios)):
            for ratio in ratios:
                check_ratio(ratio, f"{name} retention ratio")

    def build(self, geometry: KVGeometry, layer: int) -> PairCodec:
        heads, layers = geometry.kv_heads, len(geometry.capsule_layers)
        for name, ratios in (("key", self.key_ratios), ("value", self.value_ratios)):
            if len(ratios) != layers:
                raise ConfigError(
                    f"{len(ratios)} {name} retention ratios for {layers} layers: give one for each layer."
                )
        n_keys, n_values = (retained(r[layer], self.tile) for r in (self.key_ratios, self.value_ratios))
        mlp = self.key_decoder == "mlp"
        keys = MlpKeys(heads, self.tile, n_keys, self.hidden) if mlp else RetainedKeys(heads, self.tile, n_keys)
        return PairCodec(keys, PcaValues(heads, self.tile, n_values, geometry.head_dim))
