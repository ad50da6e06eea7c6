"""The digest of a capsule, and what else is computed from its tensors once for as long as they stay what they are."""

import hashlib
import json
import weakref
from collections.abc import Callable, Hashable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from .. import atomic_files

if TYPE_CHECKING:
    from .capsule import Capsule

T = TypeVar("T")
_FACTS = ("metadata", "base_revision")
"""Keys of a capsule's config that are for the reader: they change nothing of what is stored."""


class _State(NamedTuple):
    """What changes with a module's tensors."""

    tensors: list[weakref.ref[torch.Tensor]]
    """Weak references, because an address may be used again; a tensor has one such reference while it lives."""
    facts: list[tuple[Any, ...]]

    @classmethod
    def of(cls, module: nn.Module) -> "_State":
        named = [(n, t) for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)]
        facts = [(n, t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for n, t in named]
        return cls([weakref.ref(t) for _, t in named], facts)

    def equals(self, other: "_State") -> bool:
        return self.facts == other.facts and all(
            one is two for one, two in zip(self.tensors, other.tensors, strict=True)
        )


class Computed:
    """Values computed from a module's tensors, forgotten when these are replaced, moved, cast or written to.

    Writes that PyTorch does not count (through `.data`, or under `torch.inference_mode`) are not noticed: call `forget`
    after them.
    """

    def __init__(self) -> None:
        self._known = _State([], []), dict[Hashable, Any]()

    def get_or_make(self, module: nn.Module, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`: `make()` where it is not known for the module's present tensors."""
        state = _State.of(module)
        known, values = self._known
        if not known.equals(state):
            values = {}
            self._known = state, values
        if key not in values:
            values[key] = make()
        value: T = values[key]
        return value

    def forget(self) -> None:
        """Forget all values."""
        self._known = _State([], []), {}

    def __reduce__(self) -> tuple[type["Computed"], tuple[()]]:
        # Copies of the module have tensors of their own.
        return Computed, ()


def capsule_digest(capsule: "Capsule") -> str:
    """SHA-256, in hex, of what a capsule's config and tensors are: equal capsules have the same, wherever they lie and
    however they were loaded. `metadata`, the base model's revision and codec settings at their default do not count.

    It is computed once for as long as the tensors stay what they are (see Computed).
    """
    return capsule.computed.get_or_make(capsule, "digest", lambda: _digest(capsule))


def _digest(capsule: "Capsule") -> str:
    config = {name: value for name, value in capsule.config.to_dict().items() if name not in _FACTS}
    # A setting that a later version adds has a default that means what its absence meant before.
    defaults = {field.name: field.default for field in fields(capsule.config.codec)}
    config["codec"] = {name: value for name, value in config["codec"].items() if value != defaults[name]}
    digest = hashlib.sha256(json.dumps(atomic_files.plain(config, "config"), sort_keys=True).encode())
    for name, tensor in sorted(capsule.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
