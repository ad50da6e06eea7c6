"""CapsuleCache: a transformers Cache whose full-attention layers hold segments and a raw tail."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..kernels import attend
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, CompressionPass, DecodeState, LayerByLayerPass, Method
from ..segments.segment import Memo, Segment, storage_bytes
from ..vlm.geometry import KVGeometry
from ..vlm.spans import VisualSpan, find_spans
from . import attention_interface
from .tail import StaticTail, Tail

_SPARE = 64
"""Tokens by which a tail may be longer than a revision needs before its buffer is given back."""


class CacheBytes(NamedTuple):
    """What a cache holds, in bytes of storages."""

    visual: int
    """Segments of the visual spans."""
    text: int
    """Segments of the prompt's text."""
    tail: int
    """Buffers of the tokens written since, room to grow included, and the latest queries where a method asks for
    them."""
    other: int
    """The model's own layers (sliding window, linear attention)."""
    parameters: int
    """Maps of the codecs that the segments read: stored once, whatever the batch."""
    host: int = 0
    """What methods keep in the host's memory, beside the device's."""

    @property
    def total(self) -> int:
        """All that is on the device, but the parameters."""
        return self.visual + self.text + self.tail + self.other


class Turn(NamedTuple):
    """What one forward brings: set by the hook on the model before its layers run."""

    spans: list[VisualSpan]
    valid: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    shared: dict[tuple[int, bool, torch.device], Any]
    """What its layers have in common (see LayerPrefill.shared)."""
    compression: CompressionPass
    """Compresses its layers."""
    layers: Mapping[int, "CapsuleLayer"]
    """Where what is compressed goes, by index in the model."""


class CapsuleLayer(CacheLayerMixin):
    """One layer: visual segments, text segments and the tail."""

    is_sliding = False
    is_croppable = True
    tail: Tail
    """Made by the first `update`."""

    def __init__(self, index: int, method: Method, room: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.method, self.room = index, method, room
        self.is_compileable = room is not None
        self.turn = self.idle()
        self.visual: list[Segment] = []
        self.text: list[Segment] = []
        self.before = 0
        """Tokens that came before the tail."""
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self._decode_time = method.decode_time()
        self._seen: torch.Tensor | None = None
        self._closed = 0
        self.queries: torch.Tensor | None = None
        """[B, H * G, W, D]: the latest queries, for a method that acts during decoding."""
        self.hidden: torch.Tensor | None = None
        """[B, N, C]: what entered the decoder layer in the present forward, for a method that asks."""
        self.shared: Memo | None = None
        """What the cache's layers have in common while their rows are selected, so that it stays in one place."""
        self.record_past = False
        self._held: LayerPrefill | None = None

    def idle(self) -> Turn:
        """Of no forward."""
        return Turn([], None, None, {}, LayerByLayerPass(self.method), {self.index: self})

    @property
    def waits(self) -> bool:
        """Whether a prefill is yet to be compressed (see activate_past_recording)."""
        return self._held is not None

    @property
    def fresh(self) -> bool:
        return self.before == 0 and self.tail_length == 0

    @property
    def tail_length(self) -> int:
        """Tokens written since the last compression."""
        return self.tail.length if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.tail = (
            Tail(key_states, value_states) if self.room is None else StaticTail(key_states, value_states, self.room)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens' keys and values [B, H, N, D]; what is returned are these alone, for the attention
        function to know."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        self._new = (key_states, value_states)
        attention_interface.announce(self)
        return key_states, value_states

    def attend(self, query: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        assert self._new is not None
        keys, values = self._new
        new = keys.shape[2]
        if self.turn.spans:
            # A new image behind a compressed past: the tail is closed as text, the new tokens are read raw and
            # compressed afterwards.
            self._close_tail(mask, new)
            tail = _rows(keys, values)
            visible: torch.Tensor | None = _latest(mask, new, query.device)
        else:
            self.tail.append(keys, values)
            self._new = None
            tail, visible = self.tail.segment(), self.tail.visible(mask, query.shape[2])
        if visible is not None:
            visible = visible.expand(query.shape[0], -1, -1)
        # The last query sees every token but padding.
        self._seen = None if visible is None or self._decode_time is None else visible[:, -1]
        return attend(query, [*self.visual, *self.text, tail], scale, visible)

    def commit(self, query: torch.Tensor, scale: float) -> None:
        if self._new is None:
            self.hidden = None
            self._remember(query)
            self._act_on_tail(scale)
        else:
            self.store_prefill(self.take_prefill(query, scale))

    def take_prefill(self, query: torch.Tensor, scale: float) -> LayerPrefill:
        """What the present forward brought to this layer, as a method sees it; the layer is then as it was before.

        Args:
            query: [B, H * G, N, D] of the forward's tokens.
            scale: factor of the attention scores.
        """
        assert self._new is not None
        (keys, values), self._new = self._new, None
        hidden, self.hidden = self.hidden, None
        turn, rotation, valid = self.turn, self.turn.position_embeddings, self.turn.valid
        if valid is None:
            valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        # Where a model's layers lie on several devices, what one forward brings for all of them lies on the first.
        if rotation is not None:
            rotation = (rotation[0].to(keys.device), rotation[1].to(keys.device))
        return LayerPrefill(
            self.index, query, keys, values, turn.spans, valid.to(keys.device), scale, rotation, turn.shared, hidden
        )

    def store_prefill(self, prefill: LayerPrefill) -> None:
        """Compress a prefill of this layer behind what is stored, now or (see activate_past_recording) later."""
        if not self.is_initialized:
            self.lazy_initialization(prefill.keys, prefill.values)
        self._remember(prefill.query)
        self.before += prefill.keys.shape[2]
        if self.record_past:
            self._held = prefill
        else:
            self._compress(prefill)

    def _compress(self, prefill: LayerPrefill) -> None:
        for index, compressed in self.turn.compression.add(prefill):
            self.turn.layers[index].store(compressed)

    def store(self, compressed: Compressed) -> None:
        """Take what the method made of a prefill, behind what is there."""
        self.visual += compressed.visual
        self.text += compressed.text

    def activate_past_recording(self) -> None:
        """Wait, from now on, for a `crop` (or the next forward) before a prefill is compressed: candidates to take back
        may be in it.

        generate asks for it before assisted decoding. Until then all layers hold their full keys and values.
        """
        self.record_past = True

    def settle(self, drop: int = 0) -> None:
        """Compress a prefill that waited, but for its last `drop` tokens."""
        if self._held is not None:
            prefill = self._held.without_last(drop)
            self._held = None
            self._compress(prefill)

    def _remember(self, query: torch.Tensor) -> None:
        if self._decode_time is not None:
            latest = query if self.queries is None else torch.cat([self.queries, query], dim=2)
            self.queries = latest[:, :, max(0, latest.shape[2] - self._decode_time.window) :].clone()

    def _act_on_tail(self, scale: float) -> None:
        """Let a decode-time method act once `interval` new tokens are there; candidates that may be taken back are left
        alone."""
        if self._decode_time is None or self.record_past:
            return
        interval = self._decode_time.interval
        if self._closed + self.tail_length < interval or self.tail_length < min(self._decode_time.window, interval):
            return
        assert self.queries is not None
        keys, values = self.tail.written()
        seen = (
            torch.ones(keys.shape[0], self.tail_length, dtype=torch.bool, device=keys.device)
            if self._seen is None
            else self._seen
        )
        state = DecodeState(self.index, self.visual, self.text, keys, values, seen, self.queries, scale)
        self.visual, self.text = self._decode_time.on_decode(state)
        self.before += self.tail_length
        self._closed = 0
        # Many tokens in one forward may have made the buffer longer than it will be needed.
        self.tail.clear(most=interval + _SPARE)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the mask of the next forward, and where it begins: over segments, of the tail alone."""
        return (
            (self.tail.mask_length(query_length), self.before)
            if self.is_initialized and self.before
            else (query_length, 0)
        )

    def get_seq_length(self) -> int:
        """The logical length: tokens that the model believes it has seen; on the device (a tensor) where the tail is
        static."""
        if not self.is_initialized:
            return 0
        # transformers' own static layers return a tensor too: nothing then waits for the device, and no step is another
        # program.
        return self.before + (self.tail.count if isinstance(self.tail, StaticTail) else self.tail.length)  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self.index, self.method, self.room)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of the tail (a negative number, as transformers passes it).

        Raises:
            ValueError: for a positive number (an absolute length, in older versions of transformers), or if more are to
                be removed than the tail holds: what is compressed cannot be cut (see activate_past_recording for what
                is about to be).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the count of tokens to take back.")
        count = -tokens_to_remove
        if self._held is not None:
            self.settle(drop=count)
            self.before -= count
            return
        if count > self.tail_length:
            raise ValueError(
                f"cannot remove {count} tokens: only the {self.tail_length} written since prefill are stored raw, the"
                " prompt is compressed."
            )
        self.tail.crop(count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.tail.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.tail.keys.shape[0])[indices.cpu()])

    def offload(self) -> None:
        """Move what is stored to the host's memory, until `prefetch` or the next token fetches it; the codecs' maps
        stay where they are."""
        if self.is_initialized:
            self.settle()
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Fetch back what `offload` moved."""
        if self.is_initialized and self.tail.keys.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.visual, self.text = [s.to(device) for s in self.visual], [s.to(device) for s in self.text]
        self.tail.move(device)

    def _select(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        self.settle()
        rows = rows.to(self.tail.keys.device)
        self.visual = [s.select(rows, self.shared) for s in self.visual]
        self.text = [s.select(rows, self.shared) for s in self.text]
        self.tail.select(rows)
        if self.queries is not None:
            self.queries = self.queries.index_select(0, rows)

    def _close_tail(self, mask: torch.Tensor | None, new: int) -> None:
        """Make the tail a text segment and begin an empty one."""
        if self.tail_length == 0:
            return
        keys, values = (written.clone() for written in self.tail.written())
        seen = None
        if mask is not None:
            # The last query sees every token but padding.
            seen = mask[:, 0, -1, : self.tail_length].expand(keys.shape[0], -1)
            seen = None if bool(seen.all()) else seen.clone()
        self.text.append(_rows(keys, values, seen))
        self._closed += self.tail_length
        self.before += self.tail_length
        self.tail.clear()


class CapsuleCache(Cache):
    """A KV cache that stores what a method makes of the prompt: a capsule's latents, a policy's rows.

    Give it to `model.generate(..., cache=cache)` or to the model's forward (`past_key_values=cache` before transformers
    5.24), inside `attach(model)`; keep it for the next turn.

    Args:
        config: the VLM's config.
        method: what compresses (Capsule or policy).
        room: tokens that can be written behind the prompt (answer and the text of later turns). With it the tail is a
            buffer of this size at a fixed address with its length on the device, and transformers' generate compiles
            the decode step where it would for its own static cache; without, the tail grows.

    Raises:
        GeometryError: for models without a KV geometry (see KVGeometry.from_config).
        ValueError: for a room that is none, or beside a method that acts during decoding.
    """

    def __init__(self, config: PreTrainedConfig, method: Method, room: int | None = None) -> None:
        KVGeometry.from_config(config)
        if room is not None and room < 1:
            raise ValueError(
                f"room {room}: give the tokens to be written behind the prompt, at least 1, or None for a tail that"
                " grows."
            )
        if room is not None and method.decode_time() is not None:
            raise ValueError(
                f"{type(method).__name__} acts during decoding, which changes what is stored and is not"
                " for a static tail: make the CapsuleCache without room."
            )
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
        super().__init__(
            layers=[CapsuleLayer(i, method, room) if type(own) is DynamicLayer else own for i, own in enumerate(layers)]
        )
        self.config, self.method = config, method

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapsuleCache":
        """A cache to go on from apart from this one; the method, and what its segments share, are not copied."""
        shared: list[Any] = [self.method, self.config]
        shared += [t for layer in self._own() for s in (*layer.visual, *layer.text) for t in s.parameter_tensors()]
        memo.update({id(thing): thing for thing in shared})
        twin: CapsuleCache = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def begin(self, input_ids: torch.Tensor | None, attention_mask: Any, inputs: Mapping[str, Any]) -> None:
        """Prepare for a forward over input_ids [B, N] (those not yet cached); called by the hook that `attach` sets.

        Raises:
            ValueError: if the forward brings embeddings alone, from which visual tokens cannot be told.
        """
        attention_interface.forget()
        self._settle()
        layers = {layer.index: layer for layer in self._own()}
        turn = Turn([], None, None, {}, self.method.begin_pass(list(layers)), layers)
        if input_ids is None:
            if self.get_seq_length() == 0:
                raise ValueError(
                    "pass input_ids: the cache finds the visual tokens by their placeholders, which inputs_embeds do"
                    " not show."
                )
        elif input_ids.shape[1] > 1 or self.get_seq_length() == 0:
            valid = _valid(attention_mask, *input_ids.shape)
            turn = turn._replace(spans=find_spans(self.config, input_ids, inputs), valid=valid)
        self._set(turn)

    def fill(self, prefills: Sequence[LayerPrefill], compression: CompressionPass | None = None) -> None:
        """Store recorded prefills in an empty cache, as the forward that they were recorded from would have.

        Args:
            prefills: of all layers with full attention, in their order.
            compression: what compresses them; None: a pass of the method.

        Raises:
            ValueError: if the cache is not empty, or the layers are not those of the prefills.
        """
        layers = {layer.index: layer for layer in self._own()}
        if self.get_seq_length() > 0 or [prefill.layer for prefill in prefills] != list(layers):
            raise ValueError(
                f"prefills of the layers {[prefill.layer for prefill in prefills]} cannot fill a cache of"
                f" {self.get_seq_length()} tokens whose layers with full attention are {list(layers)}."
            )
        if compression is None:
            compression = self.method.begin_pass(list(layers))
        self._set(Turn([], None, None, {}, compression, layers))
        shared: dict[tuple[int, bool, torch.device], Any] = {}
        for prefill in prefills:
            hidden = prefill.hidden if self.method.needs_hidden_states else None
            layers[prefill.layer].store_prefill(replace(prefill, shared=shared, hidden=hidden))
        self.end()

    def end(self) -> None:
        """The forward is over: what it brought is let go, but for layers that wait; called by the hook that `attach`
        sets."""
        for layer in self._own():
            layer.turn = layer.turn._replace(spans=[]) if layer.waits else layer.idle()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a layer's mask. transformers asks just before it makes one, which is when its form must
        be known."""
        layer = self.layers[layer_idx]
        attention_interface.read_segments(isinstance(layer, CapsuleLayer) and not layer.fresh)
        return super().get_mask_sizes(query_length, layer_idx)

    def set_position_embeddings(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """The rotation of the present forward's positions; called by the hook that `attach` sets."""
        waiting = [layer for layer in self._own() if layer.turn.spans]
        # Some models make a rotation for their windowed layers alone.
        if waiting and KVGeometry.from_config(self.config).rotary != "none":
            for layer in waiting:
                layer.turn = layer.turn._replace(position_embeddings=(cos, sin))

    def set_hidden(self, index: int, hidden: torch.Tensor) -> None:
        """What enters decoder layer `index` in the present forward, [B, N, C]; called by the hook that `attach`
        sets."""
        layer = self.layers[index]
        if isinstance(layer, CapsuleLayer) and layer.method.needs_hidden_states:
            layer.hidden = hidden

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        with self._selecting():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self._selecting():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        with self._selecting():
            super().batch_select_indices(indices)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self._settle()
        super().offload(layer_idx, only_non_sliding)

    def _settle(self) -> None:
        """Compress prefills that waited, in all layers: a method may give what it makes of one layer with that of a
        later one."""
        for layer in self._own():
            layer.settle()

    @contextmanager
    def _selecting(self) -> Iterator[None]:
        """While rows of the batch are selected: all layers select the same ones."""
        self._settle()
        shared = Memo()
        for layer in self._own():
            layer.shared = shared
        try:
            yield
        finally:
            for layer in self._own():
                layer.shared = None

    def bytes(self) -> CacheBytes:
        """Measured from storages; a storage that layers share counts once."""
        own = self._own()
        visual = [s for layer in own for s in layer.visual]
        text = [s for layer in own for s in layer.text]
        tails = [
            t for layer in own if layer.is_initialized for t in (*layer.tail.tensors(), layer.queries) if t is not None
        ]
        tails += [
            t
            for layer in own
            if layer._held is not None
            for t in (layer._held.query, layer._held.keys, layer._held.values)
        ]
        others = [
            t
            for layer in self.layers
            if not isinstance(layer, CapsuleLayer)
            for t in vars(layer).values()
            if isinstance(t, torch.Tensor)
        ]
        return CacheBytes(
            visual=storage_bytes(t for s in visual for t in s.entry_tensors()),
            text=storage_bytes(t for s in text for t in s.entry_tensors()),
            tail=storage_bytes(iter(tails)),
            other=storage_bytes(iter(others)),
            parameters=storage_bytes(t for s in (*visual, *text) for t in s.parameter_tensors()),
            host=storage_bytes(t for s in (*visual, *text) for t in s.host_tensors()),
        )

    def _own(self) -> list[CapsuleLayer]:
        return [layer for layer in self.layers if isinstance(layer, CapsuleLayer)]

    def _set(self, turn: Turn) -> None:
        for layer in self._own():
            layer.turn = turn


def _valid(mask: Any, batch: int, new: int) -> torch.Tensor | None:
    """[batch, new] bool: which of a forward's tokens are no padding, from a mask of any form that models take; None:
    all are."""
    if isinstance(mask, Mapping):
        # One for each kind of layer: of layers with full attention, the last query sees every token but padding.
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise NotImplementedError(
            f"padding cannot be read from a mask of the type {type(mask).__name__}: pass the mask [batch, tokens] of"
            ' ones and zeros, and for a CapsuleCache with room choose model.set_attn_implementation("sdpa") or'
            ' "eager", before attaching.'
        )
    if mask.dim() == 4:
        last = mask[:, 0, -1]
        mask = last if last.dtype == torch.bool else last == 0
    # One mask may stand for all rows.
    valid: torch.Tensor = mask[:, -new:].bool().expand(batch, -1)
    return valid


def _rows(keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> Segment:
    return Segment(keys, values, torch.arange(keys.shape[0], device=keys.device), mask=mask, each_row=True)


def _latest(mask: torch.Tensor | None, new: int, device: torch.device) -> torch.Tensor:
    """Which of the `new` tokens of a forward each of its queries sees: [B or 1, Q, new] bool."""
    return torch.ones(new, new, dtype=torch.bool, device=device).tril()[None] if mask is None else mask[:, 0, :, -new:]
