"""Keep everything: the full cache, held as segments."""

from dataclasses import dataclass

from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.segment import Segment
from .base import VisualPolicy


@dataclass(frozen=True)
class Full(VisualPolicy):
    """All visual tokens raw."""

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        return Compressed(gather_kept(prefill, prefill.visual(), alike="visual"), text)
