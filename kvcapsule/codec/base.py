"""What a codec is: an encoder and a linear decoder for the tiles of one layer, or of a stack of layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from ..segments.quantized_rows import QuantizedRows, check_bits
from ..segments.rotary_frame import Frame
from ..segments.segment import Rows, Segment
from ..vlm.geometry import KVGeometry


class KeyPart(NamedTuple):
    """Encoded keys and the maps that let attention read them (see Segment)."""

    keys: Rows
    score_map: torch.Tensor | None = None
    q_map: torch.Tensor | None = None


class ValuePart(NamedTuple):
    """Encoded values and the maps that let attention read them (see Segment)."""

    values: Rows
    value_map: torch.Tensor | None = None
    value_mean: torch.Tensor | None = None
    out_map: torch.Tensor | None = None


class KeyCodec(nn.Module, ABC):
    """A codec for the keys of one layer."""

    @abstractmethod
    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        """Encode tiles of keys, in their canonical frames if the family's config says so."""


class ValueCodec(nn.Module, ABC):
    """A codec for the values of one layer."""

    @abstractmethod
    def encode(self, v_EHTD: torch.Tensor) -> ValuePart:
        """Encode tiles of values."""


class Encoded(NamedTuple):
    """The encoded tiles of one layer."""

    keys: KeyPart
    values: ValuePart
    bias: torch.Tensor | None = None
    """[E, H, N] added to the scores (see Segment)."""

    def segment(self, owner: torch.Tensor, frame: Frame | None) -> Segment:
        """The tiles as attention reads them."""
        return Segment(owner=owner, frame=frame, bias=self.bias, **self.keys._asdict(), **self.values._asdict())

    def quantised(self, bits: int) -> "Encoded":
        """The same with latents of `bits` bits, a step and a zero for each channel of an entry."""

        def pack(rows: Rows) -> Rows:
            if not isinstance(rows, torch.Tensor):
                raise ValueError(f"latents of type {type(rows).__name__} are packed already and take no latent_bits.")
            return QuantizedRows.pack(rows, bits)

        return self._replace(
            keys=self.keys._replace(keys=pack(self.keys.keys)),
            values=self.values._replace(values=pack(self.values.values)),
        )


class LayerCodec(nn.Module, ABC):
    """What encodes the tiles of one layer."""

    @abstractmethod
    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        """Encode tiles of keys (in their canonical frames if the family's config says so) and of values.

        They are lent (kvcapsule.methods.tiles.cut_tiles): what is stored as it is must be a copy.
        """


class PairCodec(LayerCodec):
    """A codec of the keys beside one of the values, neither of which needs the other."""

    def __init__(self, keys: KeyCodec, values: ValueCodec) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        return Encoded(self.keys.encode(k_EHTD), self.values.encode(v_EHTD))


class StackEncoding(ABC):
    """One forward's tiles of a stack of layers on their way to what is stored."""

    @abstractmethod
    def add(self, place: int, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> None:
        """Take the tiles of the layer at `place` in the stack; they are lent, as to LayerCodec.encode."""

    @abstractmethod
    def finish(self, places: Sequence[int]) -> list[Encoded]:
        """What the layers at these places read, once all were added; what they have in common is stored once."""


class StackCodec(nn.Module, ABC):
    """What encodes the tiles of a stack of neighbouring layers together."""

    @abstractmethod
    def start(self) -> StackEncoding:
        """Begin with the tiles of one forward."""


@dataclass(frozen=True)
class CodecConfig(ABC):
    """All that fixes the shapes of a family's codecs. Subclasses add their fields; unknown ones are refused by name."""

    tile: int
    """Visual tokens that one map covers; what is left at an image's end is stored raw."""
    canonical_frame: bool = True
    """Encode keys as if their tile began at position 0."""
    latent_bits: int = field(default=0, kw_only=True)
    """Bits of each stored latent, 1, 2, 3, 4 or 8; 0 stores latents in the cache's own precision."""

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"tile {self.tile} must be at least 1 token.")
        if self.latent_bits:
            check_bits(self.latent_bits)

    @property
    def stacked(self) -> int:
        """Layers that have a codec together; 0 where each has its own."""
        return 0

    @abstractmethod
    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec | StackCodec:
        """The untrained codec of one layer, or of the stack that begins with it."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError naming keys that this family does not have."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(f.name for f in fields(cls))}."
            )
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)
