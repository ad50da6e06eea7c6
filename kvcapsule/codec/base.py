"""Codec interface: an encoder and a linear decoder for the tiles of one layer, or of a group of layers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from ..errors import ConfigError
from ..field_checks import check_fields
from ..segments.packed_rows import Rows, stored_tensors
from ..segments.quantized_rows import QuantizedRows, check_bits
from ..segments.rotary_frame import Frame
from ..segments.segment import Segment
from ..vlm.geometry import KVGeometry
from .blocks import require_whole_blocks

TILES = "tiles"
"""Segment.tag of encoded tiles; the other visual segments of a capsule are raw rows."""


class KeyPart(NamedTuple):
    """Encoded keys, with the maps by which attention reads them (see Segment)."""

    keys: Rows
    score_map: torch.Tensor | None = None
    q_map: torch.Tensor | None = None


class ValuePart(NamedTuple):
    """Encoded values, with the maps by which attention reads them (see Segment)."""

    values: Rows
    value_map: torch.Tensor | None = None
    value_mean: torch.Tensor | None = None
    out_map: torch.Tensor | None = None


class KeyCodec(nn.Module, ABC):
    """A codec for the keys of one layer."""

    borrows_tiles: bool = False
    """See LayerCodec."""

    @abstractmethod
    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        """Encode tiles of keys, in their canonical frames if the family's config says so."""


class ValueCodec(nn.Module, ABC):
    """A codec for the values of one layer."""

    borrows_tiles: bool = False
    """See LayerCodec."""

    @abstractmethod
    def encode(self, v_EHTD: torch.Tensor) -> ValuePart:
        """Encode tiles of values."""


class Encoded(NamedTuple):
    """The encoded tiles of one layer."""

    keys: KeyPart
    values: ValuePart
    bias: torch.Tensor | None = None
    """[E, H, N] added to the scores (see Segment)."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is stored of the tiles."""
        yield from (*stored_tensors(self.keys.keys), *stored_tensors(self.values.values))
        if self.bias is not None:
            yield self.bias

    def segment(self, owner: torch.Tensor, frame: Frame | None) -> Segment:
        """The tiles as a segment that attention reads."""
        parts = {**self.keys._asdict(), **self.values._asdict()}
        return Segment(owner=owner, frame=frame, bias=self.bias, tag=TILES, **parts)

    def quantised(self, bits: int) -> "Encoded":
        """The encoded tiles with latents quantised to `bits` bits (QuantizedRows)."""

        def pack(rows: Rows) -> Rows:
            if not isinstance(rows, torch.Tensor):
                raise ConfigError(f"latents of type {type(rows).__name__} are packed already and take no latent_bits.")
            return QuantizedRows.pack(rows, bits)

        return self._replace(
            keys=self.keys._replace(keys=pack(self.keys.keys)),
            values=self.values._replace(values=pack(self.values.values)),
        )


class LayerCodec(nn.Module, ABC):
    """Codec of one layer: encodes the keys and values of its tiles."""

    borrows_tiles: bool = False
    """Whether the tiles that it encodes may be in memory that is overwritten afterwards: True spares a copy of each
    layer's tiles, and promises that nothing encoded is a view of them (kvcapsule.methods.tiles.cut_tiles)."""

    @abstractmethod
    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        """Encode tiles of keys (in their canonical frames if the family's config says so) and of values."""


class PairCodec(LayerCodec):
    """Codec of one layer made of independent codecs for its keys and its values."""

    def __init__(self, keys: KeyCodec, values: ValueCodec) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.borrows_tiles = keys.borrows_tiles and values.borrows_tiles

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        return Encoded(self.keys.encode(k_EHTD), self.values.encode(v_EHTD))


class LayerGroupEncoding(ABC):
    """Encoder state of one layer group during one forward."""

    @abstractmethod
    def add(self, index: int, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> None:
        """Take the tiles of layer `index` of the layer group."""

    @abstractmethod
    def finish(self, indices: Sequence[int]) -> list[Encoded]:
        """The encoded tiles of the layers at these indices, after all were added; shared tensors are stored once."""


class LayerGroupCodec(nn.Module, ABC):
    """Codec of a layer group: encodes the tiles of neighbouring layers together."""

    borrows_tiles: bool = False
    """See LayerCodec."""

    @abstractmethod
    def start(self) -> LayerGroupEncoding:
        """Begin the encoding of one forward's tiles."""


@dataclass(frozen=True)
class CodecConfig(ABC):
    """Settings that determine the tensor shapes of a family's codecs. Subclasses add fields."""

    tile: int
    """Visual tokens per tile; tokens of an image that are in no full tile are stored raw."""
    canonical_frame: bool = True
    """Encode keys as if their tile began at position 0."""
    latent_bits: int = field(default=0, kw_only=True)
    """Bits of each stored latent, 1, 2, 3, 4 or 8; 0 stores latents in the cache's own precision."""
    align: int = field(default=1, kw_only=True)
    """Tiles begin at positions of the sequence that are multiples of this, such as the blocks of a paged cache; 1:
    at an image's first token."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tile < 1:
            raise ConfigError(f"tile {self.tile} must be at least 1 token.")
        require_whole_blocks(self.tile, self.align)
        if self.latent_bits:
            check_bits(self.latent_bits)

    @property
    def layer_group(self) -> int:
        """Layers per layer group, which share one codec; 0: one codec per layer."""
        return 0

    @abstractmethod
    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec | LayerGroupCodec:
        """The untrained codec of the layer that is number `layer` of `geometry.capsule_layers`, or of the layer group
        that begins with it."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config with these values; raises ConfigError that names keys which the family does not have."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(unknown)[:200]}; it has"
                f" {', '.join(f.name for f in fields(cls))}."
            )
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in required if name not in values]:
            raise ConfigError(f"{cls.__name__} lacks {', '.join(missing)}.")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)
