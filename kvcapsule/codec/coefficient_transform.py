"""Parts that the transform codes share: a basis along tokens with the coding of its coefficients, and their config."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import ConfigError
from ..field_checks import check_least
from ..segments.bit_packing import GROUP
from ..segments.coefficient_rows import Coding
from ..vlm.geometry import KVGeometry
from .base import CodecConfig
from .checked_tensors import CheckedTensors, check_positive, check_widths
from .noise_shaping import check_query_bank, shaped


class CellTransform(nn.Module, CheckedTensors):
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

    def check_tensors(self) -> None:
        check_widths("widths", self.widths)
        # Encoding divides by the step of every cell, uncoded ones included.
        check_positive("step", self.step)

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


def merge_heads(x_EHTD: torch.Tensor, heads: int) -> torch.Tensor:
    """Concatenate the heads of each head group along the channels: [E, H, T, D] to [E, H / heads, T, heads * D]."""
    groups: torch.Tensor = x_EHTD.unflatten(1, (-1, heads)).transpose(2, 3)
    return groups.flatten(3)


def split_heads(channels_SWC: torch.Tensor, heads: int) -> torch.Tensor:
    """Split maps of head groups into maps of single heads: [S, heads * D, C] to [S * heads, D, C]."""
    maps: torch.Tensor = channels_SWC.unflatten(1, (heads, -1))
    return maps.flatten(0, 1)


@dataclass(frozen=True)
class CoefficientCodecConfig(CodecConfig):
    """Settings that the families transform and cross-layer share."""

    joint_heads: int = field(default=1, kw_only=True)
    """KV heads per head group, which are coded together; divides the number of KV heads."""
    bits: float = field(default=0.0, kw_only=True)
    """Mean bits of codes per element of keys and values. Information only: the widths are in the weights."""
    readers: int = field(default=0, kw_only=True)
    """Queries per KV head and layer in the query bank that weights tokens (kvcapsule.codec.noise_shaping); 0: equal
    weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_query_bank(self.readers)
        check_least(self, {"bits": 0})
        if self.latent_bits:
            raise ConfigError(
                f"latent_bits {self.latent_bits}: the coefficients of a transform code have bits of their own; leave"
                " it 0."
            )

    def check_sizes(self, rows: str, channels: str) -> None:
        """Raises ConfigError if one of these fields has a number of rows or channels that no cell can have."""
        if wrong := [c for c in getattr(self, channels) if c < 1]:
            raise ConfigError(f"{channels} {wrong}: at least 1 channel is needed.")
        if wrong := [r for r in getattr(self, rows) if r < 1 or r % GROUP]:
            raise ConfigError(f"{rows} {wrong}: a cell has {GROUP} rows, so their number is a multiple of {GROUP}.")

    def head_groups(self, geometry: KVGeometry) -> int:
        """Head groups of a model; raises ConfigError if joint_heads does not divide its KV heads."""
        if self.joint_heads < 1 or geometry.kv_heads % self.joint_heads:
            raise ConfigError(
                f"joint_heads {self.joint_heads} does not divide {geometry.kv_heads} KV heads into head groups."
            )
        return geometry.kv_heads // self.joint_heads
