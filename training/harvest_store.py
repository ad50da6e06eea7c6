"""Harvest store: harvests on disk, so that the frozen VLM runs once per batch for any number of capsules.

A file holds the harvest of one batch, all layers, as safetensors. Its name is a digest of everything that the harvest
depends on: the model's weights, config and active adapters, the batch's inputs, the tile, its alignment and the frame.
A file can therefore never be out of date, and capsules of all families and compressions share one folder.
"""

import hashlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.atomic_files import remove_litter_in, replacing
from kvcapsule.errors import InputError
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.weights import ModelIdentity, UnreadableError

from .harvest import AT_SPANS, Alignment, LayerHarvest, harvest
from .tile_sample import LayerTiles

FORMAT = 3
"""Version of the file format; part of every digest."""
_SUFFIX = ".harvest.safetensors"
_FRAME, _REST = ("frame.cos", "frame.sin"), ("rest.keys", "rest.values", "rest.owner", "rest.mask")


class HarvestStore:
    """Folder with harvests of one model."""

    def __init__(
        self, folder: Path, model: PreTrainedModel, tile: int, canonical: bool, report: Callable[[str], None] = print
    ) -> None:
        """Make the folder, if need be.

        Args:
            folder: of the harvests; one that may only be read serves as long as all are there.
            model: whose harvests they are.
            tile: tokens of a tile.
            canonical: whether keys are in the tiles' own frames.
            report: called with a line on the size of the first harvest.

        Raises:
            InputError: if the folder cannot be made.
        """
        self.report: Callable[[str], None] | None = report
        self.folder, self.model, self.tile, self.canonical = folder, model, tile, canonical
        self._identity = ModelIdentity(model)
        self._first = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error

    def harvest(self, inputs: BatchFeature, alignment: Alignment = AT_SPANS) -> list[LayerHarvest]:
        """The harvest of a batch, read from its file; computed and written if there is none.

        Raises:
            InputError: if a file cannot be written or read, or the model's weights cannot.
        """
        path = self.path(inputs, alignment)
        if self._first:
            # Each batch has a file of its own: what killed runs left of any of them goes.
            remove_litter_in(self.folder, _SUFFIX)
            self._first = False
        if path.is_file():
            try:
                return _read(path, self.model.device)
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, error) from error
        layers = harvest(self.model, inputs, self.tile, self.canonical, alignment)
        try:
            _write(layers, path)
        except (OSError, SafetensorError) as error:
            raise self._refused(error) from error
        if self.report is not None:
            size, questions = path.stat().st_size / 2**20, len(inputs["input_ids"])
            self.report(f"harvests are kept in {self.folder}: {size / questions:.1f} MiB a question")
            self.report = None
        return layers

    def tiles(self, path: Path, layers: range) -> list[LayerTiles]:
        """The tiles of some layers in a file that `harvest` wrote.

        Raises:
            InputError: if it cannot be read.
        """
        try:
            with safe_open(path, "pt", device=str(self.model.device)) as file:
                return [LayerTiles(*(file.get_tensor(f"{i}.{name}") for name in LayerTiles._fields)) for i in layers]
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error

    def _refused(self, error: Exception) -> InputError:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        return InputError(
            f"no harvest can be kept in {self.folder}: {reason}. Free some space, name another --harvests, or leave it"
            " out."
        )

    def path(self, inputs: BatchFeature, alignment: Alignment = AT_SPANS) -> Path:
        """Path of the file for the harvest of these inputs."""
        try:
            model = self._identity.get()
        except UnreadableError as error:
            raise InputError(f"harvests of this model cannot be told apart: {error}. Leave --harvests out.") from error
        about = f"{FORMAT} {self.tile} {self.canonical} {model.weights} {model.adapter}"
        digest = hashlib.blake2b(about.encode(), digest_size=20)
        for name in sorted(inputs):
            _add(digest, name, inputs[name])
        if alignment != AT_SPANS:
            _add(digest, "alignment", tuple(alignment))
        return self.folder / f"{digest.hexdigest()}{_SUFFIX}"


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"the harvest {path} cannot be read: {error}. Delete it, and it is made anew.")


def _add(digest: Any, name: str, value: Any) -> None:
    digest.update(name.encode())
    if not isinstance(value, torch.Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    # As bytes, because numpy has no bfloat16.
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write(layers: list[LayerHarvest], path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        parts = {
            f.name: getattr(layer, f.name) for f in fields(layer) if isinstance(getattr(layer, f.name), torch.Tensor)
        }
        parts |= dict(zip(_REST, (layer.rest.keys, layer.rest.values, layer.rest.owner, layer.rest.mask), strict=True))
        if layer.frame is not None:
            parts |= dict(zip(_FRAME, layer.frame.tensors(), strict=True))
        # Cloned, because layers share tensors, which safetensors does not allow.
        tensors |= {f"{index}.{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in parts.items()}
    first = layers[0]
    interleaved = first.frame is not None and first.frame.interleaved
    # No other process reads a partial file.
    with replacing(path) as partial:
        save_file(
            tensors,
            partial,
            {"scales": " ".join(repr(layer.scale) for layer in layers), "neighbours": str(int(interleaved))},
        )


def _read(path: Path, device: torch.device) -> list[LayerHarvest]:
    with safe_open(path, "pt", device=str(device)) as file:
        metadata = file.metadata()
        names = set(file.keys())
        layers = []
        for index, scale in enumerate(metadata["scales"].split()):

            def get(name: str, index: int = index) -> torch.Tensor:
                tensor: torch.Tensor = file.get_tensor(f"{index}.{name}")
                return tensor

            frame = (
                Frame(get(_FRAME[0]), get(_FRAME[1]), metadata["neighbours"] == "1")
                if f"{index}.{_FRAME[0]}" in names
                else None
            )
            keys, values, owner, mask = map(get, _REST)
            rest = Segment(keys, values, owner, mask=mask)
            plain = {name: get(name) for name in ("keys", "values", "owner", "query", "reads", "visible", "place")}
            layers.append(LayerHarvest(**plain, frame=frame, rest=rest, scale=float(scale)))
    return layers
