"""What identifies a model: its config, the values of all its tensors, and its adapters.

The digest reads every tensor, which takes seconds for a model of some billions of parameters; it is computed at the
first call and again whenever something changed. A change is noticed by the config, by the tensors themselves, by
PyTorch's count of writes to them, by the adapters' state, and, as a write through `.data` is not counted (adapters are
merged by such), by some elements of each tensor. A write through `.data` to single elements can go unnoticed: call
`forget` after it.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Any, NamedTuple

import torch

_SAMPLES = 64
"""Elements of a tensor that are looked at in every call."""
_OF_MODULES = frozenset(vars(torch.nn.Module())) - {"training"}
"""Attributes that every module has: parameters, hooks."""


class UnreadableError(ValueError):
    """A model whose values cannot be read in full. The message is the reason."""


class Identity(NamedTuple):
    """Digests, in hex, of what a model is."""

    weights: str
    """Of its class, its config and all its tensors, those of adapters too."""
    adapter: str
    """Of which adapters are active, merged and disabled, and how they are scaled; "" without any."""


class ModelIdentity:
    """The identity of a model at each time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._lock = Lock()
        self._known: tuple[_State, Identity] | None = None

    def get(self) -> Identity:
        """The model's identity now.

        Raises:
            UnreadableError: if a tensor is not in memory, or of a kind that cannot be read as bytes.
        """
        with self._lock:
            adapter = adapter_state(self.model)
            state = _State.of(self.model, adapter)
            if self._known is None or not self._known[0].equals(state):
                self._known = None
                digest = hashlib.sha256(adapter.encode()).hexdigest() if adapter else ""
                self._known = state, Identity(weights_digest(self.model), digest)
            return self._known[1]

    def forget(self) -> None:
        """Compute the digest anew at the next call."""
        self._known = None


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256, in hex, of a model's class, config and tensors; the attention implementation does not count."""
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}\n".encode())
    digest.update(_config_text(model).encode())
    tensors = sorted(_tensors(model).items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, _), one in zip(tensors, pool.map(tensor_digest, (t for _, t in tensors)), strict=True):
            digest.update(f"{name} {one}\n".encode())
    return digest.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of a tensor's type, shape and values, wherever it lies.

    Raises:
        UnreadableError: if it has no values to be read.
    """
    if tensor.is_meta:
        raise UnreadableError("some of its weights are not in memory")
    if type(tensor.data) is not torch.Tensor or tensor.layout != torch.strided:
        raise UnreadableError(f"its weights are of the kind {type(tensor.data).__name__}, which has no plain bytes")
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapter_state(model: torch.nn.Module) -> str:
    """Which adapters a model's layers have, and what they do with them; "" without any."""
    layers = {
        name: [f"{type(module).__module__}.{type(module).__qualname__}", _settings(module)]
        for name, module in model.named_modules()
        # In layers with adapters this is a switch; models of transformers have a method of this name.
        if isinstance(getattr(module, "disable_adapters", None), bool)
    }
    return json.dumps(layers, sort_keys=True) if layers else ""


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """A module's attributes of JSON's types: names, switches, factors."""
    settings = {}
    for name, value in vars(module).items():
        if name in _OF_MODULES:
            continue
        plain = _plain(value)
        with suppress(TypeError, ValueError):
            json.dumps(plain)
            settings[name] = plain
    return settings


def _config_text(model: torch.nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    return "" if config is None else json.dumps(_plain(config.to_dict()), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """Without what changes nothing of the values that a model computes, and in an order that is always the same."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith(("_attn_", "_name_or_path"))}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a model computes with: its state, and the buffers that are not saved."""
    named: Iterable[tuple[str, Any]] = [
        *model.state_dict(keep_vars=True).items(),
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


class _State(NamedTuple):
    """What changes when a model does."""

    tensors: list[weakref.ref[torch.Tensor]]
    """Weak references, because an address may be used again."""
    facts: list[Any]
    samples: bytes

    @classmethod
    def of(cls, model: torch.nn.Module, adapter: str) -> "_State":
        tensors = [*model.parameters(), *model.buffers()]
        facts: list[Any] = [adapter, _config_text(model)]
        facts += [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.shape, t.device) for t in tensors]
        return cls([weakref.ref(t) for t in tensors], facts, _samples(tensors))

    def equals(self, other: "_State") -> bool:
        return (
            len(self.tensors) == len(other.tensors)
            and self.facts == other.facts
            and self.samples == other.samples
            and all(one() is two() for one, two in zip(self.tensors, other.tensors, strict=True))
        )


@torch.no_grad()
def _samples(tensors: list[torch.Tensor]) -> bytes:
    """Bytes of a few elements of each tensor."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        # What cannot be read is refused where it is read in full.
        if tensor.is_meta or type(tensor.data) is not torch.Tensor or tensor.layout != torch.strided:
            continue
        if not tensor.numel():
            continue
        if not tensor.is_contiguous():
            tensor = tensor[..., 0].contiguous()
        step = -(-tensor.numel() // _SAMPLES)
        chosen = tensor.as_strided((-(-tensor.numel() // step),), (step,))
        groups.setdefault((tensor.device, tensor.dtype), []).append(chosen)
    parts = [torch.cat(group).cpu().view(torch.uint8).numpy().tobytes() for group in groups.values()]
    return b"".join(parts)
