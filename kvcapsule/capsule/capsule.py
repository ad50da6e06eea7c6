"""Capsule: the trained artefact, config and codecs of all layers, and the method that compresses visual spans with them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..codec import FAMILIES, CodecConfig, LayerCodec, StackCodec
from ..methods.layer_prefill import Compressed, LayerPrefill
from ..methods.method import LayerByLayer, Run
from ..vlm.geometry import KVGeometry
from .runs import StackRun, canonical_tiles

FORMAT_VERSION = 1
"""Raised whenever this code could not read, or would misread, what an earlier one wrote; a new family or field does not raise it."""


class CapsuleError(ValueError):
    """A capsule's files are missing, damaged, or of a kind that this version does not know."""


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
            raise CapsuleError(f"unknown codec family {family!r}; this version of kvcapsule knows {', '.join(FAMILIES)}.")
        known = {"format_version", "family", "base_model", "base_revision", "geometry", "codec", "metadata"}
        if unknown := sorted(set(values) - known):
            raise CapsuleError(f"capsule config has unknown keys {', '.join(unknown)}; it may hold {', '.join(sorted(known))}.")
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
            raise CapsuleError(f"capsule config lacks {error.args[0]!r}: the file is damaged or was written by hand.") from error
        except (TypeError, ValueError) as error:
            raise CapsuleError(f"capsule config cannot be used: {error}") from error


class Capsule(nn.Module):
    """Codecs for every layer of a model, or for every stack of layers. Give it to `attach` or `CapsuleCache`."""

    def __init__(self, config: CapsuleConfig) -> None:
        super().__init__()
        self.config = config
        first = range(0, config.geometry.layers, max(1, config.codec.stacked))
        self.layers = nn.ModuleList(config.codec.build(config.geometry, layer) for layer in first)

    def require_geometry(self, geometry: KVGeometry) -> None:
        """Raises GeometryError, with both geometries, unless the capsule fits."""
        self.config.geometry.require(geometry)

    def start(self, layers: Sequence[int]) -> Run:
        """One forward's compression of these layers (indices in the model)."""
        codecs = [codec for codec in self.layers if isinstance(codec, StackCodec)]
        return StackRun(codecs, self.config.codec, self.config.geometry, layers) if codecs else LayerByLayer(self)

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        """One layer's visual tiles to latents; text, and what fills no tile, raw.

        Raises:
            ValueError: if its codec is one of several layers, which `start` compresses together.
        """
        config = self.config.codec
        if config.stacked:
            raise ValueError(f"layer {prefill.layer} has no codec of its own: all layers are compressed together, by `start`.")
        tiles, raw = canonical_tiles(prefill, config, self.config.geometry)
        if tiles is None:
            return raw
        codec = self.layers[prefill.layer]
        assert isinstance(codec, LayerCodec)
        encoded = codec.encode(tiles.keys, tiles.values)
        if config.latent_bits:
            encoded = encoded.quantised(config.latent_bits)
        return Compressed([encoded.segment(tiles.owner, tiles.frame), *raw.visual], raw.text)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        recipe: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        card_name: str | None = None,
    ) -> None:
        """Write the capsule to a directory; see kvcapsule.capsule.hub.save."""
        from . import hub

        hub.save(self, directory, recipe=recipe, metrics=metrics, card_name=card_name)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], revision: str | None = None, device: torch.device | str = "cpu") -> "Capsule":
        """Load a capsule from a directory, a shipped name or a repository on the Hub; see kvcapsule.capsule.hub.load."""
        from . import hub

        return hub.load(name, revision=revision, device=device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Upload capsule",
        recipe: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the capsule and return its address; see kvcapsule.capsule.hub.push.

        A capsule does not remember the recipe and metrics that it was saved with: give them here, or push its directory.
        """
        from . import hub

        return hub.push(
            self,
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            recipe=recipe,
            metrics=metrics,
        )
