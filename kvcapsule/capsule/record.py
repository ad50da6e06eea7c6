"""What a capsule's config records, in `metadata`, of what it was trained on: the base model and the data set.

Everything is optional: capsules of earlier versions and those made by hand lack it. No machine's paths are recorded: a
folder or file is named by its last part, and the model in it is identified by the fingerprint.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import CapsuleError, shortened
from ..vlm.fingerprint import Fingerprint

MODEL, DATA = "model", "data"
"""Keys of `metadata`."""


@dataclass(frozen=True)
class ModelRecord:
    """The base model beyond its name and revision, which are keys of the config."""

    local: bool = False
    """Whether it was loaded from a folder; its name is then the folder's."""
    dtype: str | None = None
    """Precision that it ran in."""
    weights: dict[str, str] = field(default_factory=dict)
    """Its weights' fingerprint by precision; empty: not known."""
    adapter: str = ""
    """Fingerprint of the active adapters; "" without any."""
    license: dict[str, str] = field(default_factory=dict)
    """Its licence, by the keys of a model card; empty: not known."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "ModelRecord":
        """The record in a config's metadata.

        Raises:
            CapsuleError: naming the key, for a value of the wrong type.
        """
        values = _mapping(metadata, MODEL)
        allowed: dict[str, Any] = {"local": bool, "dtype": (str, type(None)), "adapter": str}
        for name in ("weights", "license"):
            texts = values.get(name, {})
            if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
                raise CapsuleError(f"metadata.{MODEL}.{name} is {shortened(repr(texts))}, expected names and texts.")
        for name, kind in allowed.items():
            if name in values and not isinstance(values[name], kind):
                value = shortened(repr(values[name]))
                raise CapsuleError(f"metadata.{MODEL}.{name} is {value}, which is of the wrong type.")
        return cls(**{name: values[name] for name in (*allowed, "weights", "license") if name in values})

    @property
    def fingerprint(self) -> Fingerprint | None:
        """None where it is not known."""
        return Fingerprint(self.dtype, self.weights, self.adapter) if self.dtype and self.weights else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def data_record(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the data set, as in kvcapsule.data.source.SourceConfig, without size and seed; `local`: whether the
    source was a file or folder. Empty where they are not recorded.

    Raises:
        CapsuleError: for a value of the wrong type.
    """
    values = _mapping(metadata, DATA)
    for name in ("source", "split"):
        if values and not isinstance(values.get(name), str):
            raise CapsuleError(f"metadata.{DATA}.{name} is {shortened(repr(values.get(name)))}, expected a text.")
    return values


def _mapping(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    values = metadata.get(key, {})
    if not isinstance(values, dict):
        raise CapsuleError(f"metadata.{key} is {shortened(repr(values))}, expected names and values.")
    return values
