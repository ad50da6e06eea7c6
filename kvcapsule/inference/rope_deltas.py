"""Rope deltas belong to a cache: by how far the positions of text lie behind the count of tokens, once images came.

A model with M-RoPE keeps the deltas of the prompt that it saw last on one of its modules, as transformers writes it. A
cache that goes on after another prompt, or with chosen rows of its batch, would get positions of that other prompt. So
the cache keeps its own, and the model's are those of the cache wherever the model computes positions: of the cache that
the thread reads, for each thread sees those that it wrote.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import local
from typing import Any

import torch
from transformers import PreTrainedModel

from .cache import CapsuleCache
from .own_class import own_class
from .transformers_api import passed_cache

_ATTRIBUTE = "rope_deltas"
_POSITIONS_OF_GENERATE = "_prepare_position_ids_for_generation"


class RopeDeltas:
    """The modules of one model that keep rope deltas."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = [module for module in model.modules() if _ATTRIBUTE in vars(module)]

    @contextmanager
    def per_thread(self) -> Iterator[None]:
        """While the block lasts, a thread reads the deltas that it wrote; one that wrote none reads the last ones."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(own_class(module, {_ATTRIBUTE: _of_thread(module)}))
            yield

    def begin_forward(self, cache: CapsuleCache, inputs: Mapping[str, Any]) -> None:
        """Give the model the deltas of `cache`; inputs: the forward's keyword arguments."""
        if not self.modules:
            return
        positions = inputs.get("position_ids")
        if not isinstance(positions, torch.Tensor) or positions.dim() < 3 or positions.shape[0] < 3:
            self.restore(cache)
        elif positions.shape[2] > 1 or cache.rope_deltas is None:
            cache.rope_deltas = _deltas(positions, inputs.get("attention_mask"), int(cache.get_seq_length()))

    def end_forward(self, cache: CapsuleCache, inputs: Mapping[str, Any]) -> None:
        """Keep in `cache` the deltas that the model computed, where it computed the positions."""
        if self.modules and inputs.get("position_ids") is None:
            cache.rope_deltas = getattr(self.modules[0], _ATTRIBUTE)

    def restore(self, cache: CapsuleCache) -> None:
        """Make the model's deltas those of `cache`: none where it is empty."""
        for module in self.modules:
            setattr(module, _ATTRIBUTE, cache.rope_deltas)

    def in_generate(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """While the block lasts, generate computes the positions of a CapsuleCache's tokens from the cache's deltas."""
        prepare = getattr(type(model), _POSITIONS_OF_GENERATE, None)
        if not self.modules or prepare is None:
            return nullcontext()

        def prepare_of_cache(this: PreTrainedModel, input_ids: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
            cache = passed_cache(inputs)
            if isinstance(cache, CapsuleCache) and this is model:
                self.restore(cache)
            positions: torch.Tensor = prepare(this, input_ids, inputs)
            return positions

        return own_class(model, {_POSITIONS_OF_GENERATE: prepare_of_cache})


def _of_thread(module: torch.nn.Module) -> property:
    """The deltas of `module` as this thread wrote them. They are written into its own dictionary too, where they are
    found behind the block; a copy of the module has its own."""
    written = local()

    def get(self: torch.nn.Module) -> torch.Tensor | None:
        deltas: torch.Tensor | None = vars(self)[_ATTRIBUTE]
        return getattr(written, "deltas", deltas) if self is module else deltas

    def put(self: torch.nn.Module, deltas: torch.Tensor | None) -> None:
        vars(self)[_ATTRIBUTE] = deltas
        if self is module:
            written.deltas = deltas

    return property(get, put)


def _deltas(positions: torch.Tensor, mask: Any, past: int) -> torch.Tensor:
    """[B, 1]: the position behind a forward's last token, less the tokens up to it.

    Args:
        positions: [3 or more, B, N] of the forward's tokens; the last three are time, height and width.
        mask: [B, past + N], zero at padding; of any other form: there is no padding.
        past: tokens before the forward's.
    """
    tokens = torch.full(positions.shape[1:2], past + positions.shape[2], device=positions.device)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] == past + positions.shape[2]:
        tokens = mask.bool().sum(1).to(positions.device)
    return (positions[-3:].amax((0, 2)) + 1 - tokens)[:, None]
