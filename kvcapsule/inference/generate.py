"""What `attach` puts before a model's generate: the cache, and the refusal of what a CapsuleCache cannot serve."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..vlm.geometry import KVGeometry
from .attached import attached_here
from .cache import CapsuleCache
from .generate_options import option
from .transformers_api import passed_cache, set_cache


def generate_with_capsule(model: PreTrainedModel, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the model's generate with a CapsuleCache of the method that this thread attached, wherever generate uses a
    cache and is given none. With cache_implementation="static" its tail holds max_new_tokens at a fixed address.

    Raises:
        ConfigError: for options that ask for a cache of another kind, or that feed the prompt in pieces, and for a
            prompt that does not go on from the cache that is given.
        NotImplementedError: for attention weights, which attention over segments does not have.
    """
    attached = attached_here(model)
    method, prompts = (None, None) if attached is None else (attached.method, attached.prompts)
    uses_cache = option(model, args, kwargs, "use_cache") is not False
    if prompts is not None and uses_cache:
        kwargs = prompts.read(args, kwargs) or kwargs
    if passed_cache(kwargs) is None and method is not None and uses_cache:
        tail_capacity = None
        if kwargs.get("cache_implementation") == "static":
            tail_capacity = _tail_capacity(model, args, kwargs)
            del kwargs["cache_implementation"]
        _refuse_another_cache(model, args, kwargs)
        new = CapsuleCache(model.config, method, tail_capacity)
        if option(model, args, kwargs, "is_assistant"):
            # What this model drafts for another is taken back where that disagrees.
            new.activate_past_recording()  # type: ignore[no-untyped-call]
        set_cache(kwargs, new)
    cache = passed_cache(kwargs)
    if isinstance(cache, CapsuleCache):
        _refuse_options(model, args, kwargs)
        if cache.taken_in:
            _require_positions(cache, kwargs)
            cache.taken_in = False
        _require_continuation(cache, args, kwargs)
    return generate(*args, **kwargs)


def _tail_capacity(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tokens = option(model, args, kwargs, "max_new_tokens")
    if tokens is None:
        raise ConfigError('cache_implementation="static" needs max_new_tokens, the capacity of the static tail.')
    return int(tokens)


def _refuse_another_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    kind = option(model, args, kwargs, "cache_implementation")
    # "hybrid" stands in older generation configs of the Hub; transformers drops it by itself.
    if kind not in (None, "hybrid"):
        raise ConfigError(
            f"cache_implementation={kind!r} asks for a cache of transformers' own, and this model is attached to use a"
            " CapsuleCache. Leave the option out (or set it to None in the generation config that names it), or"
            ' generate outside the `with attach(...)` block. generate(..., cache_implementation="static") itself is'
            " served: by a CapsuleCache whose tail holds max_new_tokens."
        )


def _refuse_options(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    chunk = option(model, args, kwargs, "prefill_chunk_size")
    if chunk is not None:
        raise ConfigError(
            f"prefill_chunk_size={chunk} feeds the prompt in pieces, of which all but the first would be computed from"
            " what is compressed already. Leave the option out: a CapsuleCache takes a prompt in one forward."
        )
    if option(model, args, kwargs, "output_attentions"):
        raise NotImplementedError(
            "output_attentions: attention over segments makes no weights of the tokens that they stand for. Leave the"
            " option out, or generate outside the `with attach(...)` block."
        )


def _require_continuation(cache: CapsuleCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a prompt that does not go on from what the cache holds."""
    input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    past = int(cache.get_seq_length())
    if past and isinstance(input_ids, torch.Tensor):
        cache.tokens.require_continuation(input_ids, kwargs.get("attention_mask"), past)


def _require_positions(cache: CapsuleCache, kwargs: dict[str, Any]) -> None:
    """Refuse a prompt behind stored spans whose M-RoPE positions the model cannot compute: it would count tokens."""
    names = ("image_grid_thw", "video_grid_thw", "position_ids")
    if KVGeometry.from_config(cache.config).rotary.startswith("mrope") and all(kwargs.get(n) is None for n in names):
        raise ConfigError(
            "this cache took in stored spans, and positions of a model with M-RoPE depend on their grids: give generate"
            " the whole prompt's input_ids and attention_mask, with mm_token_type_ids and image_grid_thw as the"
            " processor makes them (the images' pixels are not needed)."
        )
