"""Two methods as one: the first compresses the visual tokens, the second the text."""

from collections.abc import Sequence

import torch

from ..errors import ConfigError
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, CompressionPass, DecodeState, DecodeTimeMethod, Method
from ..vlm.geometry import KVGeometry


class Combined(Method):
    """Visual tokens by one method, text by another.

    Each method sees the whole prefill; the first one's text segments and the second one's visual segments are built
    and dropped again. Only the second may act during decoding, and then sees no visual segment.
    """

    def __init__(self, visual: Method, text: Method) -> None:
        """Raises ConfigError if the visual method acts during decoding, or either stores visual tokens and text
        together."""
        if visual.decode_time() is not None:
            raise ConfigError(f"{type(visual).__name__} acts during decoding: it can only be the method of the text.")
        for method in (visual, text):
            if not method.separable:
                raise ConfigError(
                    f"{type(method).__name__} stores visual tokens and text together: it can only be a method by"
                    " itself."
                )
        self.visual, self.text = visual, text
        self.needs_hidden_states = visual.needs_hidden_states or text.needs_hidden_states
        self.reads_question = visual.reads_question
        self.independent_layers = visual.independent_layers and text.independent_layers

    def require_geometry(self, geometry: KVGeometry) -> None:
        self.visual.require_geometry(geometry)
        self.text.require_geometry(geometry)

    def check_model(self, model: torch.nn.Module, strict: bool = False) -> None:
        self.visual.check_model(model, strict)
        self.text.check_model(model, strict)

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        return Compressed(self.visual.compress(prefill).visual, self.text.compress(prefill).text)

    def begin_pass(self, layers: Sequence[int]) -> CompressionPass:
        return _CombinedPass(self.visual.begin_pass(layers), self.text.begin_pass(layers))

    def decode_time(self) -> DecodeTimeMethod | None:
        text = self.text.decode_time()
        return None if text is None else _TextAtDecodeTime(text)


class _TextAtDecodeTime(DecodeTimeMethod):
    """The text's method, from which the visual segments are hidden."""

    def __init__(self, text: DecodeTimeMethod) -> None:
        self.text = text

    @property
    def interval(self) -> int:
        return self.text.interval

    @property
    def window(self) -> int:
        return self.text.window

    def on_decode(self, state: DecodeState) -> Compressed:
        compressed = self.text.on_decode(state._replace(visual=[]))
        return Compressed(state.visual, [*compressed.visual, *compressed.text])


class _CombinedPass:
    """Two passes beside each other; a layer is done when it is done in both."""

    def __init__(self, visual: CompressionPass, text: CompressionPass) -> None:
        self.visual, self.text = visual, text
        self.pending: tuple[dict[int, Compressed], dict[int, Compressed]] = ({}, {})

    @torch.no_grad()
    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        visual, text = self.pending
        visual.update(self.visual.add(prefill))
        text.update(self.text.add(prefill))
        return [
            (layer, Compressed(visual.pop(layer).visual, text.pop(layer).text))
            for layer in sorted(visual.keys() & text.keys())
        ]
