"""Values derived from a module's tensors, kept until these change."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

T = TypeVar("T")


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


class DerivedValues:
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

    def __reduce__(self) -> tuple[type["DerivedValues"], tuple[()]]:
        # Copies of the module have tensors of their own.
        return DerivedValues, ()
