"""CapsuleCache: a transformers Cache whose full-attention layers hold segments and a raw tail."""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ..capsule.stored_span import StoredSpan
from ..errors import ConfigError
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import CompressionPass, Method
from ..segments.memo import Memo
from ..vlm.geometry import KVGeometry
from ..vlm.spans import find_spans, has_pictures
from . import attention_interface
from .cache_bytes import CacheBytes, measured, uncompressed
from .cache_layer import CapsuleLayer
from .forward_context import ForwardContext
from .masks import tokens_before, valid_tokens, without_hidden
from .span_exchange import fill_layers, forward_of, give_out, require_exchangeable
from .span_record import SpanRecord
from .token_record import TokenRecord


class CapsuleCache(Cache):
    """A KV cache that stores what a method makes of the prompt: a capsule's latents, a policy's rows.

    Give it to `model.generate(..., cache=cache)` or to the model's forward (`past_key_values=cache` before transformers
    5.24), inside `attach(model)`; keep it for the next context.

    Args:
        config: the VLM's config.
        method: what compresses (Capsule or policy).
        tail_capacity: tokens that can be written behind the prompt (answer and the text of later turns). With it the
            tail is a buffer of this size at a fixed address with its length on the device, and transformers' generate
            compiles the decode step where it would for its own static cache. None: the tail grows.

    Raises:
        GeometryError: for models without a KV geometry (see KVGeometry.from_config), or of another than the method's.
        ConfigError: for a tail_capacity below 1, or beside a method that acts during decoding.
    """

    def __init__(self, config: PreTrainedConfig, method: Method, tail_capacity: int | None = None) -> None:
        method.require_geometry(KVGeometry.from_config(config))
        if tail_capacity is not None and tail_capacity < 1:
            raise ConfigError(
                f"tail_capacity {tail_capacity}: give the tokens to be written behind the prompt, at least 1, or None"
                " for a tail that grows."
            )
        if tail_capacity is not None and method.decode_time() is not None:
            raise ConfigError(
                f"{type(method).__name__} acts during decoding, which changes what is stored and is not"
                " for a static tail: make the CapsuleCache without tail_capacity."
            )
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
        super().__init__(
            layers=[
                CapsuleLayer(i, method, tail_capacity) if type(layer) is DynamicLayer else layer
                for i, layer in enumerate(layers)
            ]
        )
        self.config, self.method = config, method
        self._spans, self.tokens = SpanRecord(), TokenRecord()
        self.taken_in = False
        """Whether spans were taken in and `generate` was not called since: the model saw another prompt last."""
        self.rope_deltas: torch.Tensor | None = None
        """[B, 1]: by how far positions of text lie behind the count of tokens, in a model with M-RoPE; None: not known
        yet."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapsuleCache":
        """An independent cache of the same content; the method, and the codec maps of its segments, are not copied."""
        shared: list[Any] = [self.method, self.config]
        shared += [
            t for layer in self.capsule_layers() for s in (*layer.visual, *layer.text) for t in s.parameter_tensors()
        ]
        memo.update({id(value): value for value in shared})
        copied: CapsuleCache = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def capsule_layers(self) -> list[CapsuleLayer]:
        """The full-attention layers, in their order."""
        return [layer for layer in self.layers if isinstance(layer, CapsuleLayer)]

    def begin_forward(self, input_ids: torch.Tensor | None, attention_mask: Any, inputs: Mapping[str, Any]) -> None:
        """Prepare for a forward over input_ids [B, N] (those not yet cached); called by the hook that `attach` sets.

        Raises:
            ConfigError: if the forward brings embeddings alone, which do not show the visual tokens.
        """
        attention_interface.clear_pending_layer()
        self._flush_pending()
        layers = {layer.index: layer for layer in self.capsule_layers()}
        first = next(iter(layers.values()))
        if input_ids is None and first.is_empty:
            raise ConfigError(
                "pass input_ids: the cache finds the visual tokens by their placeholders, which inputs_embeds do not"
                " show."
            )
        context = ForwardContext([], None, None, {}, self.method.begin_pass(list(layers)), layers)
        # What a decode step over a static tail is, the device alone knows.
        if input_ids is not None and (input_ids.shape[1] > 1 or first.tail_capacity is None or first.is_empty):
            batch, new = input_ids.shape
            past = self._begin_record(input_ids, attention_mask)
            if new > 1 or past == 0:
                valid = valid_tokens(attention_mask, batch, new)
                spans = find_spans(self.config, input_ids, inputs) if has_pictures(inputs) else []
                spans = without_hidden(spans, valid)
                before = tokens_before(attention_mask, batch, new, past) if spans and past else None
                context = context._replace(spans=spans, valid=valid, before=before)
        self._set_context(context)
        if input_ids is not None:
            self._spans.announce(context.spans, context.valid, len(input_ids), first)

    def _begin_record(self, input_ids: torch.Tensor, attention_mask: Any) -> int:
        """Check the forward against what is cached, and note its tokens; returns how many came before."""
        layers = self.capsule_layers()
        past, new = int(layers[0].get_seq_length()), input_ids.shape[1]
        self._require_whole()
        # On an accelerator a decode step does not wait for the device to tell.
        if layers[0].tail_start and (new > 1 or input_ids.device.type == "cpu"):
            self.tokens.require_mask(attention_mask, past + new, layers[0].tail_start)
        self.tokens.begin(input_ids, attention_mask, past, new)
        return past

    def fill(self, prefills: Sequence[LayerPrefill], compression: CompressionPass | None = None) -> None:
        """Store recorded prefills in an empty cache, as the forward that they were recorded from would have.

        Args:
            prefills: of all layers with full attention, in their order.
            compression: what compresses them; None: a pass of the method.

        Raises:
            ValueError: if the cache is not empty, or the layers are not those of the prefills.
        """
        layers = {layer.index: layer for layer in self.capsule_layers()}
        if self.get_seq_length() > 0 or [prefill.layer for prefill in prefills] != list(layers):
            raise ValueError(
                f"prefills of the layers {[prefill.layer for prefill in prefills]} cannot fill a cache of"
                f" {self.get_seq_length()} tokens whose layers with full attention are {list(layers)}."
            )
        if compression is None:
            compression = self.method.begin_pass(list(layers))
        self._set_context(ForwardContext([], None, None, {}, compression, layers))
        first = prefills[0]
        self._spans.announce(first.spans, first.valid, len(first.keys), layers[first.layer])
        shared: dict[Hashable, Any] = {}
        for prefill in prefills:
            hidden = prefill.hidden if self.method.needs_hidden_states else None
            layers[prefill.layer].store_prefill(replace(prefill, shared=shared, hidden=hidden))
        self.end_forward()

    def end_forward(self) -> None:
        """Drop the context of the forward, but for pending prefills; called by the hook that `attach` sets."""
        for layer in self.capsule_layers():
            layer.context = layer.context._replace(spans=[]) if layer.pending_tensors() else layer.idle()
        self._spans.arrive()
        self.tokens.end()

    def stored_spans(self, row: int = 0, weights: str = "", adapter: str = "") -> list[StoredSpan]:
        """The visual spans of one batch row, each with the text right before it, in their order: what
        kvcapsule.capsule.stored_span.to_bytes stores. Text behind the last span is in none of them.

        Args:
            row: of the batch.
            weights: digest of the model's weights, for the header; "" if it is not known.
            adapter: digest or name of the model's adapter, for the header.

        Raises:
            ConfigError: if the method is no capsule, the model has layers with a cache of their own (a window, linear
                attention), or there is no such row.
        """
        capsule = require_exchangeable(self.method, self.layers)
        self._require_whole()
        self._flush_pending()
        return give_out(self.capsule_layers(), self._spans.forwards, row, capsule, weights, adapter)

    def take_in(self, spans: Sequence[StoredSpan]) -> None:
        """Fill an empty cache with the beginning of a prompt, up to the end of its last span, as a batch of one row.

        Generation goes on behind it: give `generate` the prompt's token ids, and of its images only those that are not
        among the spans.

        Args:
            spans: all of the prompt's beginning, in their order, on the device of the model.

        Raises:
            CapsuleError: if another capsule made a span, one is missing or out of order, or they differ in dtype,
                weights or adapter.
            ConfigError: if the cache is not empty, or cannot take in spans (see `stored_spans`).
            GeometryError: if the capsule is of another model.
        """
        capsule = require_exchangeable(self.method, self.layers)
        capsule.require_geometry(KVGeometry.from_config(self.config))
        fill_layers(self.capsule_layers(), spans, capsule)
        self._spans.forwards, self.taken_in = [forward_of(spans)], True

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a layer's mask. transformers asks just before it makes one, which is when its form must
        be known."""
        layer = self.layers[layer_idx]
        attention_interface.set_mask_over_segments(isinstance(layer, CapsuleLayer) and not layer.is_empty)
        return super().get_mask_sizes(query_length, layer_idx)

    def set_position_embeddings(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """The rotation of the present forward's positions; called by the hook that `attach` sets."""
        with_spans = [layer for layer in self.capsule_layers() if layer.context.spans]
        # Some models make a rotation for their windowed layers alone.
        if with_spans and KVGeometry.from_config(self.config).rotary != "none":
            for layer in with_spans:
                layer.context = layer.context._replace(position_embeddings=(cos, sin))

    def set_hidden_states(self, index: int, hidden: torch.Tensor) -> None:
        """What enters decoder layer `index` in the present forward, [B, N, C]; called by the hook that `attach`
        sets."""
        layer = self.layers[index]
        if isinstance(layer, CapsuleLayer) and layer.method.needs_hidden_states:
            layer.hidden = hidden

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        with self._select_rows(lambda rows: rows.to(beam_idx.device)[beam_idx]):
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self._select_rows(lambda rows: rows.repeat_interleave(repeats)):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        with self._select_rows(lambda rows: rows.to(indices.device)[indices]):
            super().batch_select_indices(indices)

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self._spans, self.tokens = SpanRecord(), TokenRecord()
        self.taken_in, self.rope_deltas = False, None

    def crop(self, tokens_to_remove: int) -> None:
        self._require_whole()
        super().crop(tokens_to_remove)
        self.tokens.crop(int(self.get_seq_length()))

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self._flush_pending()
        super().offload(layer_idx, only_non_sliding)

    def _require_whole(self) -> None:
        """Raises ConfigError if the last forward broke off half-way."""
        self.tokens.require_whole([int(layer.get_seq_length()) for layer in self.capsule_layers()])

    def _flush_pending(self) -> None:
        """Compress the pending prefills of all layers: a method may give back several layers at once."""
        for layer in self.capsule_layers():
            layer.flush_pending()

    @contextmanager
    def _select_rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Within the block all layers select the same rows of the batch, and tensors that they share only once; choose
        does so with a number for each row."""
        self._require_whole()
        self._flush_pending()
        self._spans.select(choose)
        self.tokens.select(choose)
        if self.rope_deltas is not None:
            rows = choose(torch.arange(len(self.rope_deltas)))
            self.rope_deltas = self.rope_deltas[rows.to(self.rope_deltas.device)]
        memo = Memo()
        for layer in self.capsule_layers():
            layer.memo = memo
        try:
            yield
        finally:
            for layer in self.capsule_layers():
                layer.memo = None

    def bytes(self) -> CacheBytes:
        """Measured from storages; a storage that layers share counts once."""
        return measured(self.layers)

    def full_bytes(self) -> int:
        """Those of the model's own cache for the same tokens: what `bytes().total` is to be held against."""
        return uncompressed(self.layers)

    def _set_context(self, context: ForwardContext) -> None:
        for layer in self.capsule_layers():
            layer.context = context
