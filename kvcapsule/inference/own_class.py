"""Attributes that one module has and its class has not, computed where they are looked up."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def own_class(module: torch.nn.Module, attributes: Mapping[str, Any]) -> Iterator[None]:
    """While the block lasts, `module` has a class of its own, of the same name, with these attributes.

    As torch.nn.utils.parametrize does it. Nothing is written into the module's own dictionary, which copies share.
    """
    kind = type(module)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (kind,), {**names, **attributes})
    try:
        yield
    finally:
        module.__class__ = kind
