"""A method for the visual tokens and another for the text: a capsule beside a policy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..codec.kvcapsule import check_ratio, retained
from ..methods.kept_rows import keep
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, Method, Revises, Run, Written, reads_hidden, start
from ..segments.quantized_rows import QuantizedRows, check_bits
from ..segments.segment import Segment
from ..vlm.geometry import KVGeometry

OBSERVED = 16
"""The prompt's last queries that rank its text."""


class TextPolicy(ABC):
    """A training-free rule for a layer's text tokens alone; as a method by itself it stores no visual token."""

    DIAL: ClassVar[str | None] = None
    """As a VisualPolicy's: the setting that says how much of the text is kept, if there is one."""

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        return Compressed([], self.compress_text(prefill))

    @abstractmethod
    def compress_text(self, prefill: LayerPrefill) -> list[Segment]:
        """Segments of the tokens that are valid and in no visual span; none where there is no such token."""


class Paired:
    """Visual tokens by one method, text by another; bytes of both are told apart as always.

    Each method sees the whole prefill; what the first makes of the text and the second of the visual tokens is built
    and dropped again. Only the second may act again while tokens are written, and then sees no visual segment.
    """

    def __init__(self, visual: Method, text: Method) -> None:
        """Raises ValueError if the visual method acts again while tokens are written, or either stores visual tokens
        and text together."""
        if isinstance(visual, Revises):
            raise ValueError(
                f"{type(visual).__name__} acts again while tokens are written: it can only be the method of the text."
            )
        for method in (visual, text):
            if not getattr(method, "SEPARABLE", True):
                raise ValueError(
                    f"{type(method).__name__} stores visual tokens and text together: it can only be a method by"
                    " itself."
                )
        self.visual, self.text = visual, text
        self.reads_hidden = reads_hidden(visual) or reads_hidden(text)
        if isinstance(text, Revises):
            self.every, self.window, self.revise = text.every, text.window, self._revise

    def require_geometry(self, geometry: KVGeometry) -> None:
        """Raises GeometryError if one of the methods was made for another KV geometry."""
        for method in (self.visual, self.text):
            check = getattr(method, "require_geometry", None)
            if check is not None:
                check(geometry)

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        return Compressed(self.visual.compress(prefill).visual, self.text.compress(prefill).text)

    def start(self, layers: Sequence[int]) -> Run:
        return _PairedRun(start(self.visual, layers), start(self.text, layers))

    def _revise(self, written: Written) -> Compressed:
        assert isinstance(self.text, Revises)
        revised = self.text.revise(written._replace(visual=[]))
        return Compressed(written.visual, [*revised.visual, *revised.text])


class _PairedRun:
    """Two runs side by side; a layer is done when both are."""

    def __init__(self, visual: Run, text: Run) -> None:
        self.visual, self.text = visual, text
        self.waiting: tuple[dict[int, Compressed], dict[int, Compressed]] = ({}, {})

    @torch.no_grad()
    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        visual, text = self.waiting
        visual.update(self.visual.add(prefill))
        text.update(self.text.add(prefill))
        return [
            (layer, Compressed(visual.pop(layer).visual, text.pop(layer).text))
            for layer in sorted(visual.keys() & text.keys())
        ]


@dataclass(frozen=True)
class TextPruning(TextPolicy):
    """Keeps a row's first text tokens, its last ones, and of those between the ones that the prompt's last queries
    attend to most.

    The score is SnapKV's (arXiv 2404.14469): attention from an observation window, summed over its queries and over
    query heads; its pooling over neighbours is not part of this, and all heads keep the same tokens. In a later turn
    the attention is that among the turn's own tokens, and the first tokens are those of the turn.
    """

    DIAL = "ratio"

    ratio: float
    """Kept text tokens / text tokens of a row, the first and the last ones included; these are kept whatever it
    says."""
    sinks: int = 4
    """First text tokens that are always kept."""
    recent: int = 16
    """Last text tokens that are always kept."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "text retention ratio")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks {self.sinks} and recent {self.recent} count tokens: 0 or more.")

    def compress_text(self, prefill: LayerPrefill) -> list[Segment]:
        text = prefill.valid & ~prefill.visual()
        counts = text.sum(dim=1)
        if self.ratio == 1:
            return keep(prefill, text)
        place = text.cumsum(dim=1)
        always = text & ((place <= self.sinks) | (place > (counts - self.recent)[:, None]))
        scores = last_attention(prefill).masked_fill(~text, -1.0).masked_fill(always, torch.inf)
        wanted = torch.tensor([retained(self.ratio, n) if n else 0 for n in counts.tolist()], device=text.device)
        wanted = torch.maximum(wanted, always.sum(dim=1))
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        return keep(prefill, text & (rank < wanted[:, None]))


def last_attention(prefill: LayerPrefill) -> torch.Tensor:
    """[B, N]: attention that each token gets from the last OBSERVED tokens of its row, summed over them and over heads.

    Rows are left-padded, so that all of them end together; only these queries' scores are computed.
    """
    heads, tokens = prefill.keys.shape[1:3]
    first = max(0, tokens - OBSERVED)
    positions = torch.arange(tokens, device=prefill.keys.device)
    query = prefill.query[:, :, first:].unflatten(1, (heads, -1)).float()
    logits = (query @ prefill.keys.float().transpose(-1, -2)[:, :, None]) * prefill.scale
    seen = prefill.valid[:, None, :] & (positions <= positions[first:, None])
    attention = logits.masked_fill(~seen[:, None, None], torch.finfo(logits.dtype).min).softmax(dim=-1)
    received: torch.Tensor = (attention * prefill.valid[:, None, None, first:, None]).sum(dim=(1, 2, 3))
    return received


@dataclass(frozen=True)
class QuantizedText(TextPolicy):
    """All text tokens in few bits, a step and a zero for each channel of a row of the batch (see QuantizedRows).

    Step and zero take as much as two raw tokens, so text of a few tokens saves little or nothing.
    """

    bits: int
    """Of a code: 1, 2, 3, 4 or 8."""

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def compress_text(self, prefill: LayerPrefill) -> list[Segment]:
        return [self._pack(segment) for segment in keep(prefill, prefill.valid & ~prefill.visual())]

    def _pack(self, segment: Segment) -> Segment:
        assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
        return replace(
            segment,
            keys=QuantizedRows.pack(segment.keys, self.bits),
            values=QuantizedRows.pack(segment.values, self.bits),
        )
