"""Keep every visual token, in few bits."""

from dataclasses import dataclass
from functools import partial

from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.quantized_rows import QuantizedRows, check_bits
from ..segments.segment import Segment
from .base import VisualPolicy
from .packed_segments import packed


@dataclass(frozen=True)
class Quantized(VisualPolicy):
    """Keys and values of visual tokens in 2, 4 or 8 bits per channel (KIVI's way for keys, arXiv 2402.02750, for both
    here)."""

    bits: int
    """Bits of one code: 1, 2, 3, 4 or 8."""

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        pack = partial(QuantizedRows.pack, bits=self.bits)
        return Compressed(packed(gather_kept(prefill, prefill.visual(), alike="visual"), pack, pack), text)
