"""fp8: every visual token in eight bits of floating point (e4m3), as vLLM's `--kv-cache-dtype fp8` has all
tokens."""

from dataclasses import dataclass
from functools import partial

from ..errors import ConfigError
from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.float8_rows import Float8Rows
from ..segments.segment import Segment
from .base import VisualPolicy
from .packed_segments import packed

SCALES = ("none", "token-head")


@dataclass(frozen=True)
class Fp8(VisualPolicy):
    """One byte an element; in half precision half of the cache.

    Not vLLM's: text and what is written stay raw, as with every policy for visual tokens here, and attention is
    computed in the working precision from rows that are read in full, which saves memory, not time. Queries are not
    rounded.
    """

    scales: str = "none"
    """"none": numbers as they are, those beyond 448 as 448; vLLM's fp8, whose scale of a layer is 1 without a
    calibration. "token-head": a scale of 4 bytes for each token and head, vLLM's fp8_per_token_head."""

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise ConfigError(f"scales {self.scales!r} is neither {' nor '.join(map(repr, SCALES))}.")

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        pack = partial(Float8Rows.pack, scaled=self.scales == "token-head")
        return Compressed(packed(gather_kept(prefill, prefill.visual()), pack, pack), text)
