"""The contract of a method: what turns a layer's prefill into segments. Capsules, policies and their combinations are
methods; all but `compress` has a default here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch

from ..segments.segment import Segment
from ..vlm.geometry import KVGeometry
from .layer_prefill import LayerPrefill


class Compressed(NamedTuple):
    """A layer's prefill as segments, those of visual tokens apart from those of text so that bytes are counted
    apart."""

    visual: list[Segment]
    text: list[Segment]


class CompressionPass(Protocol):
    """The compression of one forward, layer by layer."""

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        """Take the next layer; returns the layers that are compressed now, by their index in the model: this one, none
        yet, or several at their last."""


class DecodeState(NamedTuple):
    """A layer during decoding: B rows, M tokens since the last prefill or `on_decode`, W latest queries."""

    layer: int
    visual: list[Segment]
    text: list[Segment]
    keys: torch.Tensor
    """[B, H, M, D] of the tail, rotated as the model does; a view that is overwritten afterwards."""
    values: torch.Tensor
    """As keys."""
    valid: torch.Tensor
    """[B, M] bool: False at padding."""
    query: torch.Tensor
    """[B, H * G, W, D]: the latest queries, at most `window` of the method."""
    scale: float
    """Factor of the attention scores."""


class DecodeTimeMethod(ABC):
    """What a method does during decoding, every `interval` new tokens."""

    @property
    @abstractmethod
    def interval(self) -> int:
        """New tokens after which it acts, when `window` of them at least are in the tail.

        The others are in text segments: a new image in a later turn closes the tail before it is full.
        """

    @property
    @abstractmethod
    def window(self) -> int:
        """Latest queries that the cache holds for it."""

    @abstractmethod
    def on_decode(self, state: DecodeState) -> Compressed:
        """The layer's segments from now on, in place of those before and of the tail, which is emptied."""


class Method(ABC):
    """Anything that turns a layer's prefill into segments."""

    needs_hidden_states: bool = False
    """Whether it reads the residual stream (LayerPrefill.hidden)."""
    independent_layers: bool = True
    """Whether `compress` of a layer depends on no other layer, so that each layer may have another method."""
    reads_question: bool = False
    """Whether what it makes of the visual tokens depends on the text behind them: where the question is asked later, it
    sees none."""
    separable: ClassVar[bool] = True
    """Whether its visual segments and its text segments can be used one without the other (see Combined)."""
    budget_field: ClassVar[str | None] = None
    """The setting that says how much is kept, from 0 to 1 (all): "retention" of the visual tokens, "budget" of all;
    None: it has no such setting."""

    @abstractmethod
    def compress(self, prefill: LayerPrefill) -> Compressed:
        """One layer by itself, as its prefill ends."""

    def begin_pass(self, layers: Sequence[int]) -> CompressionPass:
        """The compression of one forward over these layers (indices in the model, in their order); here: each by
        itself."""
        return LayerByLayerPass(self)

    def require_geometry(self, geometry: KVGeometry) -> None:
        """Raises GeometryError unless the method can serve a model of this KV geometry; here: it serves any."""
        return

    def check_model(self, model: torch.nn.Module, strict: bool = False) -> None:
        """Warn (ModelMismatchWarning) if the method was trained on another model; here: it was trained on none.

        Args:
            model: of transformers, without a wrapper.
            strict: raise CapsuleError instead, and also where it cannot be known.
        """
        return

    def decode_time(self) -> DecodeTimeMethod | None:
        """What it does during decoding; here: nothing."""
        return None


class LayerByLayerPass:
    """Each layer is compressed as its prefill ends, so that at most one layer's keys and values are held in full."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        return [(prefill.layer, self.method.compress(prefill))]
