"""KIVI (arXiv 2402.02750): every visual token in few bits, keys per channel and values per token, in small groups.

    x^ = step * code + zero     step = (max - min) / (2^bits - 1),  zero = min,  over one group

A group is 32 consecutive tokens of one channel of the keys, or 32 consecutive channels of one token of the values.
"""

from dataclasses import dataclass
from functools import partial

from ..errors import ConfigError
from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.group_quantized_rows import GroupedRows
from ..segments.quantized_rows import check_bits
from ..segments.segment import Segment
from .base import VisualPolicy
from .packed_segments import packed


@dataclass(frozen=True)
class Kivi(VisualPolicy):
    """Keys and values of all visual tokens in `bits` bits, plus a step and a zero for each group.

    The paper keeps the last tokens (residual, up to 128) in full precision, so that codes come in whole groups; here
    the residual is the prompt's text and what is written after it, all raw, and a row's last group of tokens is
    shorter. A group may reach from one image of a row into the next. Bits for an element: bits + 2 * 16 / group in half
    precision.
    """

    bits: int = 2
    """Bits of one code; the paper's are 2 and 4."""
    group: int = 32
    """Elements that share a step and a zero."""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 1:
            raise ConfigError(f"group {self.group}: at least one element is needed.")

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        visual = prefill.visual()
        # Rows of each length by themselves: padding would get into the last group's range.
        segments = gather_kept(prefill, visual, max_padding=1, alike="visual")
        pack = partial(GroupedRows.pack, bits=self.bits, group=self.group)
        return Compressed(packed(segments, partial(pack, along_tokens=True), partial(pack, along_tokens=False)), text)
