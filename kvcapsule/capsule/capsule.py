"""Capsule: the trained artefact with the config and the codecs of all layers, and a method that compresses visual spans
with them."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ..codec import FAMILIES, LayerCodec, LayerGroupCodec
from ..codec.checked_tensors import CheckedTensors
from ..errors import CapsuleError, ConfigError, ModelMismatchWarning
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, CompressionPass, LayerByLayerPass, Method
from ..vlm.geometry import KVGeometry
from . import hub
from .base_model import difference, unknown
from .config import LEAN_VERSION, CapsuleConfig
from .derived_values import DerivedValues
from .lean_tensors import restored, with_given
from .read import CONFIG_FILE, WEIGHTS_FILE, config_in, header_in, require_tensors
from .runs import LayerGroupPass, canonical_tiles, move_beside, require_copies
from .training_rows import TrainingRows
from .weights_file import read_tensors
from .write import contents_of, save_folder


class Capsule(nn.Module, Method):
    """Codecs for every layer with full attention of a model, or every group of such. Pass it to `attach` or
    `CapsuleCache`."""

    def __init__(self, config: CapsuleConfig) -> None:
        super().__init__()
        self.config = config
        self.independent_layers = not config.codec.layer_group
        first = range(0, len(config.geometry.capsule_layers), max(1, config.codec.layer_group))
        self.layers = nn.ModuleList(config.codec.build(config.geometry, place) for place in first)
        self.computed = DerivedValues()
        """What was computed from the tensors: the digest, and the codecs' maps (kvcapsule.capsule.span_form)."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Moved and cast tensors may come to lie where others lay before.
        self.computed.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def require_geometry(self, geometry: KVGeometry) -> None:
        """Raises GeometryError, with both geometries, unless the capsule fits."""
        self.config.geometry.require(geometry)

    def check_model(self, model: nn.Module, strict: bool = False) -> None:
        """Warn (ModelMismatchWarning) unless `model` has the weights and adapters that the capsule was trained on, as
        far as the capsule records them.

        Raises:
            CapsuleError: with strict, if the model is another one or that cannot be known.
        """
        line = difference(self.config, model) or (unknown(self.config, model) if strict else None)
        if line is None:
            return
        if strict:
            raise CapsuleError(line.removesuffix(".") + " (refused, as strict is set).")
        warnings.warn(line, ModelMismatchWarning, stacklevel=2)

    def begin_pass(self, layers: Sequence[int]) -> CompressionPass:
        codecs = [codec for codec in self.layers if isinstance(codec, LayerGroupCodec)]
        if not codecs:
            return LayerByLayerPass(self)
        return LayerGroupPass(codecs, self.config.codec, self.config.geometry, layers)

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        """One layer's visual tiles to latents; text, and what fills no tile, raw.

        Raises:
            ValueError: if its codec is one of several layers, which `begin_pass` compresses together.
        """
        config = self.config.codec
        if config.layer_group:
            raise ValueError(
                f"layer {prefill.layer} has no codec of its own: all layers are compressed together, by `begin_pass`."
            )
        codec = self.layers[self.config.geometry.place(prefill.layer)]
        assert isinstance(codec, LayerCodec)
        tiles, raw = canonical_tiles(prefill, config, self.config.geometry, codec.borrows_tiles)
        if tiles is None:
            return raw
        move_beside(codec, tiles.keys)
        encoded = codec.encode(tiles.keys, tiles.values)
        if codec.borrows_tiles:
            require_copies(codec, [encoded], tiles)
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
        training_rows: TrainingRows | None = None,
    ) -> None:
        """Write the capsule to a directory; arguments and errors are those of kvcapsule.capsule.write.save_folder."""
        save_folder(self.config, self.state_dict(), directory, recipe, metrics, card_name, training_rows)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        revision: str | None = None,
        device: torch.device | str = "cpu",
        *,
        force_download: bool = False,
    ) -> "Capsule":
        """A capsule in eval mode, frozen, with the dtypes that it was saved in.

        Args:
            name: a directory; else the name of a shipped capsule; else a Hub id, "organisation/name".
            revision: branch, tag or commit on the Hub.
            device: where to put the codecs.
            force_download: download the files from the Hub, whatever its client's cache holds. What is damaged in the
                cache is downloaded again anyway.

        Raises:
            CapsuleError: if there is no such capsule, it cannot be downloaded, a file is missing, damaged or of another
                format version, or the tensors are not those that the config asks for.
        """
        folder = hub.find(name, revision, force_download)
        config = config_in(folder)
        header, is_lean = header_in(folder, config), config.format_version == LEAN_VERSION
        capsule = _empty(config, folder)
        require_tensors(folder, with_given(header.forms) if is_lean else header.forms, capsule.state_dict())
        # assign keeps the dtypes of the file; a copy would turn a bfloat16 capsule into a float32 one.
        tensors = read_tensors(folder / WEIGHTS_FILE, header)
        capsule.load_state_dict(restored(tensors) if is_lean else tensors, assign=True)
        capsule.require_sound_tensors(folder)
        return capsule.to(device).eval().requires_grad_(False)

    def require_sound_tensors(self, folder: Path) -> None:
        """Raises CapsuleError, naming the tensor, if a codec could not encode or read with the numbers in `folder`."""
        for name, module in self.named_modules():
            if isinstance(module, CheckedTensors):
                try:
                    module.check_tensors()
                except ConfigError as error:
                    raise CapsuleError(
                        f"{folder / WEIGHTS_FILE}: {name}.{error} The file is damaged or was changed by hand."
                    ) from error

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
        """Upload the capsule in one commit and return its address; see kvcapsule.capsule.hub.Destination and `upload`.

        A capsule does not remember the recipe and metrics that it was saved with: give them here, or push its directory
        (kvcapsule.capsule.push.push_directory).
        """
        to = hub.Destination(repo_id, private, revision, token, commit_message)
        return hub.upload(contents_of(self.config, self.state_dict(), recipe, metrics, repo_id), to)


def _empty(config: CapsuleConfig, folder: Path) -> Capsule:
    """A capsule whose tensors have shapes and no numbers, so that a config that asks for too many takes no memory.

    A family of another package may compute as it builds its codecs: those get memory.

    Raises:
        CapsuleError: if there is no such capsule.
    """
    try:
        with torch.device("meta") if config.family in FAMILIES else nullcontext():
            return Capsule(config)
    except (IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CapsuleError(
            f"{folder / CONFIG_FILE}: a {config.family} codec of these sizes cannot be built for"
            f" {config.geometry.layers} layers of {config.geometry.kv_heads} KV heads ({error}). The file is damaged"
            " or was changed by hand."
        ) from error
