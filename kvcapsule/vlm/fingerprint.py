"""A quick fingerprint of a model's weights: of some elements of every tensor, so that a fine-tune is noticed and large
models are not read.

Tensors have no names here: the fingerprint is the same in every version of transformers, and for the same model in a
folder and on the Hub. Weights are compared in a dtype that both sides can be cast to, so that the same model in another
precision has the same fingerprint; the one exception is a model that was cast to float16 before and to bfloat16 now.

Approximations: a change of elements that are not looked at is not noticed (a fine-tune changes all elements of the
matrices that it trains); nor are buffers and the config. A merged adapter is a change of the weights.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .weights import UnreadableError

_RUNS, _RUN = 4, 64
"""Runs of elements that are looked at in a tensor, and elements of a run: few places, as each may be a page of a
file."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_FROZEN = ("base_layer", "original_module")
"""Where a layer with adapters keeps the module that it wraps."""


class Fingerprint(NamedTuple):
    """Digests, in hex, of what a model computes with."""

    dtype: str
    """Precision of the model, such as float32."""
    weights: Mapping[str, str]
    """Digest of the weights without adapters by the precision that they are cast to."""
    adapter: str
    """Digest of the adapters that are active and not merged, with their factors; "" without any."""

    def has_weights_of(self, other: "Fingerprint") -> bool:
        """Whether the weights are equal in the precision of one of the two."""
        return any(
            dtype in self.weights and self.weights[dtype] == other.weights.get(dtype)
            for dtype in (self.dtype, other.dtype)
        )


_known: WeakKeyDictionary[torch.nn.Module, tuple[tuple[Any, ...], Fingerprint]] = WeakKeyDictionary()


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> Fingerprint:
    """The model's fingerprint, computed again when a tensor was replaced or written to, or an adapter was switched.

    A write through `.data` is not noticed once the fingerprint is known, but for the merging of adapters.

    Raises:
        UnreadableError: if weights are quantised, spread over processes or not in memory.
    """
    wrapped = list(_adapter_layers(model))
    parameters = list(model.parameters())
    state = (
        tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters if not p.is_meta),
        tuple((_active(layer), tuple(getattr(layer, "merged_adapters", ()))) for layer in wrapped),
    )
    known = _known.get(model)
    if known is None or known[0] != state:
        of_adapters = {id(p) for layer in wrapped for name, p in layer.named_parameters() if not _is_frozen(name)}
        samples = _samples([p for p in parameters if id(p) not in of_adapters])
        weights = {name: _digest(samples, dtype) for name, dtype in _DTYPES.items()}
        dtype = str(getattr(model, "dtype", parameters[0].dtype)).removeprefix("torch.")
        known = _known[model] = (state, Fingerprint(dtype, weights, _adapter_digest(wrapped)))
    return known[1]


def _adapter_layers(model: torch.nn.Module) -> Iterator[Any]:
    # In layers with adapters this is a switch; models of transformers have a method of this name.
    return (module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool))


def _is_frozen(name: str) -> bool:
    return name.partition(".")[0] in _FROZEN


def _active(layer: Any) -> tuple[str, ...]:
    """Names of the adapters that a layer computes with."""
    if layer.disable_adapters or getattr(layer, "merged", False):
        return ()
    return tuple(getattr(layer, "active_adapters", ()))


def _adapter_digest(layers: list[Any]) -> str:
    """Of the active adapters, whatever their names; "" without any."""
    digest = hashlib.blake2b(digest_size=16)
    used = False
    for layer in layers:
        for adapter in _active(layer):
            tensors = [p for name, p in layer.named_parameters() if not _is_frozen(name) and adapter in name.split(".")]
            if tensors:
                used = True
                factor = getattr(layer, "scaling", {}).get(adapter)
                digest.update(f"{factor} {_digest(_samples(tensors), torch.float32)}\n".encode())
    return digest.hexdigest() if used else ""


def _samples(tensors: list[torch.nn.Parameter]) -> list[tuple[torch.Size, torch.Tensor]]:
    """Shape and some elements of each tensor, on the CPU in float32; one transfer for each device."""
    chosen = [_runs(tensor.detach()) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, elements in enumerate(chosen):
        by_device.setdefault(elements.device, []).append(index)
    for indices in by_device.values():
        parts = torch.cat([chosen[i] for i in indices]).cpu().split([len(chosen[i]) for i in indices])
        for i, part in zip(indices, parts, strict=True):
            chosen[i] = part
    return [(tensor.shape, elements) for tensor, elements in zip(tensors, chosen, strict=True)]


def _runs(tensor: torch.Tensor) -> torch.Tensor:
    """Up to _RUNS runs of _RUN elements, evenly spaced, the first and the last at the ends."""
    if tensor.is_meta:
        raise UnreadableError("some of its weights are not in memory")
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or not tensor.is_floating_point():
        raise UnreadableError(f"its weights are of the kind {type(tensor).__name__}, {tensor.dtype}")
    count = tensor.numel()
    if count <= _RUNS * _RUN:
        return tensor.reshape(-1).float()
    step = (count - _RUN) // (_RUNS - 1)
    if tensor.is_contiguous():
        return tensor.as_strided((_RUNS, _RUN), (step, 1), tensor.storage_offset()).reshape(-1).float()
    at = (step * torch.arange(_RUNS)[:, None] + torch.arange(_RUN)).reshape(-1)
    return tensor[torch.unravel_index(at.to(tensor.device), tensor.shape)].float()


def _digest(samples: list[tuple[torch.Size, torch.Tensor]], dtype: torch.dtype) -> str:
    """Of tensors whose order does not count; two that are tied, or equal, are one."""
    each_tensor = {
        hashlib.blake2b(
            str(list(shape)).encode() + elements.to(dtype).view(torch.uint8).numpy().tobytes(), digest_size=16
        ).digest()
        for shape, elements in samples
    }
    return hashlib.blake2b(b"".join(sorted(each_tensor)), digest_size=16).hexdigest()
