"""CapsuleLayer: one layer of a CapsuleCache, with its segments and the raw tail behind them.

A forward calls `update`, then attention calls `attend` (if something is stored) and `commit`; see attention_interface.
"""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..errors import ConfigError
from ..kernels import attend
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, DecodeState, LayerByLayerPass, Method
from ..segments.memo import Memo
from ..segments.segment import Segment
from . import attention_interface
from .autocast import as_attention_reads
from .forward_context import ForwardContext
from .masks import present_tokens, visible_new_tokens
from .tail import StaticTail, Tail, make_tail, raw_segment

_SPARE_CAPACITY = 64
"""Tokens by which a tail's buffer may exceed a decode-time method's interval before it is freed."""


class CapsuleLayer(CacheLayerMixin):
    """One full-attention layer of a CapsuleCache: visual segments, text segments and the raw tail behind them.

    Args:
        index: of the layer in the model.
        method: what compresses.
        tail_capacity: tokens of a tail at a fixed address; None: the tail grows.
    """

    is_sliding, is_croppable = False, True
    tail: Tail
    """Made by the first `update`."""

    def __init__(self, index: int, method: Method, tail_capacity: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.method, self.tail_capacity = index, method, tail_capacity
        self.is_compileable = tail_capacity is not None
        self.context = self.idle()
        self.visual: list[Segment] = []
        self.text: list[Segment] = []
        self.tail_start = 0
        """Position of the tail's first token: tokens of all segments, compressed ones counted as they were."""
        self._new_tokens: tuple[torch.Tensor, torch.Tensor] | None = None
        """Keys and values [B, H, N, D] of the present forward, between `update` and attention."""
        self._decode_time = method.decode_time()
        self._tail_mask: torch.Tensor | None = None
        """[B, M] bool: False at padding of the tail, for a method that acts during decoding; None: no padding."""
        self._closed_length = 0
        """Tokens in text segments that were written since the method last acted."""
        self.queries: torch.Tensor | None = None
        """[B, H * G, W, D]: the latest queries, for a method that acts during decoding."""
        self.hidden: torch.Tensor | None = None
        """[B, N, C]: what entered the decoder layer in the present forward, for a method that asks."""
        self.memo: Memo | None = None
        """Tensors that the cache's layers share, while rows are selected: each is selected once."""
        self.record_past = False
        self._pending: LayerPrefill | None = None
        """A prefill that is not compressed yet (see activate_past_recording)."""

    def idle(self) -> ForwardContext:
        """The context between two forwards."""
        return ForwardContext([], None, None, {}, LayerByLayerPass(self.method), {self.index: self})

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored, not even a tail."""
        return self.tail_start == 0 and self.tail_length == 0

    @property
    def tail_length(self) -> int:
        """Tokens written since the last compression."""
        return self.tail.length if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.tail = make_tail(key_states, value_states, self.tail_capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Receive the new tokens' keys and values [B, H, N, D] and return them; attention asks for the rest."""
        self._new_tokens = as_attention_reads(key_states), as_attention_reads(value_states)
        if not self.is_initialized:
            self.lazy_initialization(*self._new_tokens)
        self.prefetch()
        attention_interface.set_pending_layer(self)
        return key_states, value_states

    def attend(self, query: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        assert self._new_tokens is not None
        keys, values = self._new_tokens
        new = keys.shape[2]
        if self.context.spans:
            # A new image behind a compressed past: the tail is closed as text, the new tokens are read raw and
            # compressed afterwards.
            self._close_tail(mask)
            tail = raw_segment(keys, values)
            visible: torch.Tensor | None = visible_new_tokens(mask, new, query.device)
        else:
            self.tail.append(keys, values)
            self._new_tokens = None
            tail, visible = self.tail.segment(), self.tail.visible(mask, query.shape[2])
        if visible is not None:
            visible = visible.expand(query.shape[0], -1, -1)
        # The last query sees every token but padding.
        self._tail_mask = None if visible is None or self._decode_time is None else visible[:, -1]
        return attend(query, [*self.visual, *self.text, tail], scale, visible)

    def commit(self, query: torch.Tensor, scale: float) -> None:
        if self._new_tokens is None:
            self.hidden = None
            self._retain_queries(query)
            self._act_on_tail(scale)
        else:
            self.store_prefill(self.take_prefill(query, scale))

    def take_prefill(self, query: torch.Tensor, scale: float) -> LayerPrefill:
        """The present forward's tokens of this layer as a method sees them, removed from the layer.

        Args:
            query: [B, H * G, N, D] of the forward's tokens.
            scale: factor of the attention scores.
        """
        assert self._new_tokens is not None
        (keys, values), self._new_tokens = self._new_tokens, None
        hidden, self.hidden = self.hidden, None
        context, rotation, device = self.context, self.context.position_embeddings, keys.device
        valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool) if context.valid is None else context.valid
        # Where a model's layers lie on several devices, what one forward brings for all of them lies on the first.
        if rotation is not None:
            rotation = (rotation[0].to(device), rotation[1].to(device))
        return LayerPrefill(
            layer=self.index,
            query=query,
            keys=keys,
            values=values,
            spans=context.spans,
            valid=valid.to(device),
            scale=scale,
            position_embeddings=rotation,
            shared=context.shared,
            before=context.before,
            hidden=hidden,
        )

    def store_prefill(self, prefill: LayerPrefill) -> None:
        """Compress a prefill of this layer behind what is stored, now or (see activate_past_recording) later."""
        if not self.is_initialized:
            self.lazy_initialization(prefill.keys, prefill.values)
        self._retain_queries(prefill.query)
        self.tail_start += prefill.keys.shape[2]
        if self.record_past:
            self._pending = prefill
        else:
            self.context.compress(prefill)

    def add_segments(self, compressed: Compressed) -> None:
        """Append what the method made of a prefill."""
        self.visual += compressed.visual
        self.text += compressed.text

    def take_in(self, compressed: Compressed, tokens: int, like: torch.Tensor) -> None:
        """Hold in an empty layer what a prefill of `tokens` tokens was compressed to; like [B, H, 0, D]: for a tail."""
        self.lazy_initialization(like, like)
        self.visual, self.text, self.tail_start = compressed.visual, compressed.text, tokens

    def activate_past_recording(self) -> None:
        """From now on compress a prefill only at the next `crop` or forward: drafted tokens can be removed before.

        generate calls this before assisted decoding. Until then all layers hold their full keys and values.
        """
        self.record_past = True

    def pending_tensors(self) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a prefill that is not compressed yet; empty if there is none."""
        return () if self._pending is None else (self._pending.query, self._pending.keys, self._pending.values)

    def flush_pending(self, drop: int = 0) -> None:
        """Compress the pending prefill without its last `drop` tokens."""
        if self._pending is not None:
            prefill = self._pending.without_last(drop)
            self._pending = None
            self.context.compress(prefill)

    def _retain_queries(self, query: torch.Tensor) -> None:
        if self._decode_time is not None:
            latest = query if self.queries is None else torch.cat([self.queries, query], dim=2)
            self.queries = latest[:, :, max(0, latest.shape[2] - self._decode_time.window) :].clone()

    def _act_on_tail(self, scale: float) -> None:
        """Let a decode-time method act once `interval` new tokens are there, unless drafted tokens may be removed."""
        if self._decode_time is None or self.record_past:
            return
        interval, window = self._decode_time.interval, self._decode_time.window
        if self._closed_length + self.tail_length < interval or self.tail_length < min(window, interval):
            return
        assert self.queries is not None
        (keys, values), tail_mask = self.tail.written(), self._tail_mask
        if tail_mask is None:
            tail_mask = torch.ones(keys.shape[0], self.tail_length, dtype=torch.bool, device=keys.device)
        state = DecodeState(self.index, self.visual, self.text, keys, values, tail_mask, self.queries, scale)
        self.visual, self.text = self._decode_time.on_decode(state)
        self.tail_start += self.tail_length
        self._closed_length = 0
        # Many tokens in one forward may have made the buffer longer than it will be needed.
        self.tail.clear(max_capacity=interval + _SPARE_CAPACITY)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the next forward's mask: it covers the tail, not the segments."""
        if self.is_initialized and self.tail_start:
            return self.tail.mask_length(query_length), self.tail_start
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that the model has been given, compressed or not; a tensor on the device where the tail is static."""
        if not self.is_initialized:
            return 0
        # As transformers' own static layers: the host does not wait for the device, and all steps are one program.
        return self.tail_start + (self.tail.count if isinstance(self.tail, StaticTail) else self.tail.length)  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self.index, self.method, self.tail_capacity)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the tail (a negative number, as transformers passes it).

        Raises:
            ConfigError: for a positive number (an absolute length, in older versions of transformers), or if more are
                to be removed than the tail holds: what is compressed cannot be cut (see activate_past_recording for
                what is about to be).
        """
        if tokens_to_remove > 0:
            raise ConfigError(f"crop({tokens_to_remove}): pass a negative number, the count of tokens to take back.")
        count = -tokens_to_remove
        if self._pending is not None:
            self.flush_pending(drop=count)
            self.tail_start -= count
            return
        if count > self.tail_length:
            raise ConfigError(
                f"cannot remove {count} tokens: only the {self.tail_length} written since prefill are stored raw, the"
                " prompt is compressed."
            )
        self.tail.crop(count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.tail.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.tail.keys.shape[0])[indices.cpu()])

    def offload(self) -> None:
        """Move segments and tail to the host's memory until `prefetch` or the next forward; codec maps stay."""
        if self.is_initialized:
            self.flush_pending()
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Fetch back what `offload` moved."""
        if self.is_initialized and self.tail.keys.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.visual, self.text = [s.to(device) for s in self.visual], [s.to(device) for s in self.text]
        self.tail.move(device)

    def _select(self, rows: torch.Tensor) -> None:
        self.flush_pending()
        rows = rows.to(self.tail.keys.device)
        self.visual = [s.select(rows, self.memo) for s in self.visual]
        self.text = [s.select(rows, self.memo) for s in self.text]
        self.tail.select(rows)
        if self.queries is not None:
            self.queries = self.queries.index_select(0, rows)

    def _close_tail(self, mask: torch.Tensor | None) -> None:
        """Make the tail a text segment and begin an empty one."""
        if self.tail_length == 0:
            return
        keys, values = (rows.clone() for rows in self.tail.written())
        self.text.append(raw_segment(keys, values, present_tokens(mask, len(keys), self.tail_length)))
        self._closed_length += self.tail_length
        self.tail_start += self.tail_length
        self.tail.clear()
