"""What a codec is: an encoder and a linear decoder for the keys or the values of one layer's tiles."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from ..geometry import KVGeometry
from ..segment import Rows


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


class LayerCodec(nn.Module):
    """The codecs of one layer."""

    def __init__(self, keys: KeyCodec, values: ValueCodec) -> None:
        super().__init__()
        self.keys, self.values = keys, values


@dataclass(frozen=True)
class CodecConfig(ABC):
    """All that fixes the shapes of a family's codecs. Subclasses add their fields; unknown ones are refused by name."""

    tile: int
    """Visual tokens that one map covers; what is left at an image's end is stored raw."""
    canonical_frame: bool = True
    """Encode keys as if their tile began at position 0."""

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"tile {self.tile} must be at least 1 token.")

    @abstractmethod
    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec:
        """Untrained codecs of one layer."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError naming keys that this family does not have."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(f.name for f in fields(cls))}.")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)
