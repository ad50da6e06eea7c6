"""The config of a capsule: all that inference needs to know of it, readable without its weights."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..codec import FAMILIES, CodecConfig
from ..errors import CapsuleError
from ..vlm.geometry import KVGeometry

FORMAT_VERSION = 1
"""Raised whenever this code could not read, or would misread, what an earlier one wrote; a new family or field does not
raise it."""


@dataclass(frozen=True)
class CapsuleConfig:
    """All that inference needs to know of a capsule, readable without its weights."""

    family: str
    """A key of kvcapsule.codec.FAMILIES."""
    codec: CodecConfig
    """Sizes of the codecs."""
    geometry: KVGeometry
    """The KV geometry that the capsule fits."""
    base_model: str
    """Hub id or name of the model that it was trained on."""
    base_revision: str | None = None
    """Revision of that model."""
    format_version: int = FORMAT_VERSION
    metadata: dict[str, Any] = field(default_factory=dict)
    """Free facts for the reader; inference does not use them."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": self.format_version,
            "family": self.family,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "geometry": self.geometry.to_dict(),
            "codec": asdict(self.codec),
            "metadata": self.metadata,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CapsuleConfig":
        """Raises CapsuleError for another format version, an unknown family, or missing and unknown keys."""
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CapsuleError(
                f"capsule format version {version!r}; this version of kvcapsule reads version {FORMAT_VERSION}. "
                "Upgrade kvcapsule, or train the capsule again."
            )
        family = values.get("family")
        if not isinstance(family, str) or family not in FAMILIES:
            raise CapsuleError(
                f"unknown codec family {family!r}; this version of kvcapsule knows {', '.join(FAMILIES)}."
            )
        known = {"format_version", "family", "base_model", "base_revision", "geometry", "codec", "metadata"}
        if unknown := sorted(set(values) - known):
            raise CapsuleError(
                f"capsule config has unknown keys {', '.join(unknown)}; it may hold {', '.join(sorted(known))}."
            )
        try:
            return cls(
                family=family,
                codec=FAMILIES[family].from_dict(values["codec"]),
                geometry=KVGeometry.from_dict(values["geometry"]),
                base_model=values["base_model"],
                base_revision=values.get("base_revision"),
                metadata=values.get("metadata", {}),
            )
        except KeyError as error:
            raise CapsuleError(
                f"capsule config lacks {error.args[0]!r}: the file is damaged or was written by hand."
            ) from error
        except (TypeError, ValueError) as error:
            raise CapsuleError(f"capsule config cannot be used: {error}") from error
