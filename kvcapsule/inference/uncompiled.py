"""A model whose modules were compiled before it was attached runs uncompiled while it is.

Prefill stores what a graph cannot hold, and hooks do not run inside of one. generate compiles the decode step of a
CapsuleCache by itself (docs/generation.md).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch

_ORIGINAL = "_torchdynamo_orig_callable"
_COMPILED_CALL = "_compiled_call_impl"


@contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """While the block lasts, modules of `model` run as they were before torch.compile; warns where one was compiled."""
    forwards = {m: vars(m)["forward"] for m in model.modules() if hasattr(vars(m).get("forward"), _ORIGINAL)}
    calls = {m: call for m in model.modules() if (call := getattr(m, _COMPILED_CALL, None)) is not None}
    if forwards or calls:
        warnings.warn(
            "this model was compiled before it was attached, and runs uncompiled inside attach. For a compiled decode"
            ' step call generate(..., cache_implementation="static", max_new_tokens=N) on the model as it was.',
            stacklevel=2,
        )
    for module, forward in forwards.items():
        original = getattr(forward, _ORIGINAL)
        # Of a bound method, torch.compile keeps the function of the class.
        module.forward = MethodType(original, module) if original is type(module).forward else original
    for module in calls:
        setattr(module, _COMPILED_CALL, None)
    try:
        yield
    finally:
        for module, forward in forwards.items():
            module.forward = forward
        for module, call in calls.items():
            setattr(module, _COMPILED_CALL, call)
