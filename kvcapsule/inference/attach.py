"""Attach a capsule or a policy to a model, for as long as a `with` block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..methods.method import Method
from ..store.image_store import ImageStore
from ..vlm.geometry import KVGeometry
from .attached import Attached, attached_as, attached_here
from .attachment import attachment
from .stored_prompt import StoredPrompts
from .transformers_api import require_supported_transformers

Model = TypeVar("Model", bound=torch.nn.Module)


@contextmanager
def attach(
    model: Model, method: Method | None = None, store: ImageStore | None = None, strict: bool = False
) -> Iterator[Model]:
    """Let `model` read CapsuleCaches, and with a method given, make `model.generate` use one wherever no cache is
    passed.

        with attach(model, Capsule.from_pretrained("...")):
            model.generate(**inputs)

    Inside the block prefill runs the attention that the model ran before (eager, sdpa, flex_attention, ...); on leaving
    it, the model is as it was. What is attached is the thread's own: other threads may attach other methods to the same
    model, and a thread that attached nothing gets the model's own generate. A thread that is handed `model.generate`
    inside the block runs it with the block's method. docs/generation.md says what works with generate.

    Args:
        model: a decoder-only VLM of transformers, or a PEFT wrapper around one.
        method: a Capsule or a policy. None: caches are passed by hand (`cache=CapsuleCache(model.config, method)`;
            `past_key_values=` before transformers 5.24).
        store: where the capsules of images are kept: an image seen before behind the same prefix is not read again
            (docs/store.md). Prompts with images are then read in pieces, so answers are those of a question that is
            asked once the images are compressed.
        strict: refuse a capsule of another model, and one of which that cannot be known, where otherwise a
            ModelMismatchWarning says that the weights or the active adapter differ.

    Raises:
        CapsuleError: with strict, if the capsule was trained on another model.
        GeometryError: if the method was made for another KV geometry.
        ModelError: if the installed transformers is not of a supported version.
        RuntimeError: if this thread attached it already.
        TypeError: for what is no model of transformers.
        ConfigError: for an attention that cannot run prefill, for adapters that put tokens of their own before the
        prompt, and for a store with a method that is no capsule.
    """
    require_supported_transformers()
    inner = _unwrapped(model)
    if attached_here(inner) is not None:
        raise RuntimeError("this model is attached already: leave the other `with attach(...)` block first.")
    geometry = KVGeometry.from_config(inner.config)
    if method is not None:
        method.require_geometry(geometry)
        method.check_model(inner, strict)
    prompts = None if store is None else StoredPrompts(inner, method, store)
    hidden = method is None or method.needs_hidden_states
    with attachment(model, inner, hidden), attached_as(inner, Attached(method, prompts, strict)):
        yield model


def _unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper; any other model is itself."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        if getattr(inner.active_peft_config, "is_prompt_learning", False):
            raise ConfigError(
                f"an adapter of the type {inner.active_peft_config.peft_type!s} puts tokens of its own before the"
                " prompt's, past the token ids by which visual tokens are found. Use an adapter of weights, such as"
                " LoRA."
            )
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"attach expects a model of transformers, or a PEFT wrapper around one, not {type(model).__name__}."
        )
    return inner
