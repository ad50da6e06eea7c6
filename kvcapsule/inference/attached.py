"""What is attached to a model in this thread: one thread's capsule is not another's.

`model.generate` is bound where it is looked up: a thread that is handed the attached model's generate, as streamers
have it, runs it with what was attached where it was handed over; a thread that looks it up by itself, having attached
nothing, gets the model's own.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from ..methods.method import Method
from .own_class import own_class
from .stored_prompt import StoredPrompts


class Attached(NamedTuple):
    """What a thread attached to a model, which its generate then uses."""

    method: Method | None
    """None: it is given no cache."""
    prompts: StoredPrompts | None
    """Reads prompts with images through a store."""
    strict: bool
    """Whether capsules of other models are refused."""


_here: ContextVar[Mapping[int, Attached]] = ContextVar("kvcapsule_attached", default={})  # noqa: B039
"""What this thread attached, by the id of the model."""


def attached_here(model: torch.nn.Module) -> Attached | None:
    """What this thread attached to a model of transformers."""
    return _here.get().get(id(model))


@contextmanager
def attached_as(model: torch.nn.Module, attached: Attached | None) -> Iterator[None]:
    """While the block lasts, `attached` is what this thread attached to `model`; None: nothing."""
    before = attached_here(model)
    _set(model, attached)
    try:
        yield
    finally:
        _set(model, before)


def _set(model: torch.nn.Module, attached: Attached | None) -> None:
    others = {key: value for key, value in _here.get().items() if key != id(model)}
    _here.set(others if attached is None else {**others, id(model): attached})


def bound_generate(
    outer: torch.nn.Module, model: torch.nn.Module, around: Callable[..., Any]
) -> AbstractContextManager[None]:
    """While the block lasts, `outer.generate` is a function that knows what is attached where it was looked up.

    Args:
        outer: the model, or a wrapper around it that has a generate.
        model: what `attached_here` is asked about.
        around: around(generate, *args, **kwargs) calls generate.
    """
    kind = type(outer)

    def generate(self: torch.nn.Module) -> Callable[..., Any]:
        plain: Callable[..., Any] = vars(self).get("generate") or _looked_up(kind, self)
        if self is not outer:
            # A copy of the model is not attached.
            return plain
        attached = attached_here(model)

        def run(*args: Any, **kwargs: Any) -> Any:
            with attached_as(model, attached):
                return around(plain, *args, **kwargs)

        return run

    def replace(self: torch.nn.Module, value: Any) -> None:
        vars(self)["generate"] = value

    return own_class(outer, {"generate": property(generate, replace)})


def _looked_up(kind: type, module: torch.nn.Module) -> Any:
    """A module's generate by its class: a function, or (in a copy of an attached model) a property."""
    attribute: Any = inspect.getattr_static(kind, "generate")
    return attribute.__get__(module, kind)
