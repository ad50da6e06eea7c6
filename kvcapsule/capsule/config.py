"""Capsule config: family, codec settings, KV geometry and base model, readable without the weights."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..codec import REGISTRY, CodecConfig
from ..errors import CapsuleError, ConfigError, shortened
from ..field_checks import check_fields
from ..vlm.geometry import KVGeometry
from .record import ModelRecord, data_record

FORMAT_VERSION, LEAN_VERSION = 1, 2
"""Tensors as they are in memory, and in 16 bits without maps that others give (kvcapsule.capsule.lean_tensors): what
training writes. A capsule keeps its version when it is saved again. A new number stands for whatever an earlier code
could not read, or would misread; a new family or field does not raise it."""
PACKAGE = "package"
"""Key of `metadata`: the installed package, "name version", that the family comes from."""


@dataclass(frozen=True)
class CapsuleConfig:
    """Description of a capsule that inference needs besides the weights; the content of config.json."""

    family: str
    """Name of a kvcapsule.codec.CodecFamily, of kvcapsule or of another package."""
    codec: CodecConfig
    """Settings of the codecs."""
    geometry: KVGeometry
    """The KV geometry that the capsule fits."""
    base_model: str
    """Hub id or name of the model that it was trained on; of a folder its last part."""
    base_revision: str | None = None
    """Revision of that model: the commit that was loaded."""
    format_version: int = FORMAT_VERSION
    metadata: dict[str, Any] = field(default_factory=dict)
    """Facts beside what decoding needs: PACKAGE where the family is another package's, and what the capsule was
    trained on (kvcapsule.capsule.record)."""

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
        if type(version) is not int or version not in (FORMAT_VERSION, LEAN_VERSION):
            raise CapsuleError(
                f"capsule format version {shortened(repr(version))}; this version of kvcapsule reads versions"
                f" {FORMAT_VERSION} and {LEAN_VERSION}. Upgrade kvcapsule, or train the capsule again."
            )
        family = values.get("family")
        metadata = values.get("metadata", {})
        package = metadata.get(PACKAGE) if isinstance(metadata, dict) else None
        known = {"format_version", "family", "base_model", "base_revision", "geometry", "codec", "metadata"}
        if unknown := sorted(set(values) - known):
            raise CapsuleError(
                f"capsule config has unknown keys {shortened(', '.join(unknown))}; it may hold"
                f" {', '.join(sorted(known))}."
            )
        codec_config = _codec_config(family, package)
        if not isinstance(metadata, dict):
            raise CapsuleError("metadata is no object of keys and values.")
        ModelRecord.of(metadata)
        data_record(metadata)
        try:
            for key in ("codec", "geometry"):
                if not isinstance(values.get(key, {}), dict):
                    raise ConfigError(f"{key} is no object of keys and values")
            config = cls(
                family=str(family),
                codec=codec_config.from_dict(values["codec"]),
                geometry=KVGeometry.from_dict(values["geometry"]),
                base_model=values["base_model"],
                base_revision=values.get("base_revision"),
                format_version=version,
                metadata=metadata,
            )
            check_fields(config)
            return config
        except KeyError as error:
            raise CapsuleError(
                f"capsule config lacks {error.args[0]!r}: the file is damaged or was written by hand."
            ) from error
        except (TypeError, ValueError) as error:
            raise CapsuleError(f"capsule config cannot be used: {error}") from error


def _codec_config(family: Any, package: Any) -> type[CodecConfig]:
    """The config class of a family; package: as the file names it, None where it names none.

    Raises:
        CapsuleError: for a family that is not installed.
    """
    # A file names an installed family, and never a module to import.
    if not isinstance(family, str) or family not in REGISTRY.names():
        raise CapsuleError(
            f"unknown codec family {shortened(repr(family))}; this installation knows {', '.join(REGISTRY.names())}."
            + (
                ""
                if package is None
                else f" Install the package {shortened(package)}, which the capsule was trained with."
            )
        )
    try:
        return REGISTRY.find(family).config
    except ConfigError as error:
        raise CapsuleError(str(error)) from error
