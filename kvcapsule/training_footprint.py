"""What training a transform or cross-layer code holds in memory beside the model and the forward of a batch, stage by
stage, and how many batches go through the model: counted from sizes alone, nothing is measured.

Bytes are those of the largest tensors that live at a time. What an allocator keeps, and what operations need between
their inputs and outputs, comes on top (docs/train.md says what was measured).
"""

from dataclasses import dataclass
from typing import NamedTuple

from .codec.grouping import joint_heads, joint_layers

SAMPLE_BYTES = 2**30
"""Of the tiles, or the harvests, that training holds for what it cannot sum up in one pass."""
HARVEST, PROBE, FISHER, MEASURE = (
    "moments of keys and values",
    "what each layer costs",
    "Fisher information of the logits",
    "held-out batches",
)
"""Titles of the stages in which batches go through the model, in order."""
_MOST_HELD_OUT = 64
_FP64, _FP32 = 8, 4


def held_out_of(questions: int) -> int:
    """How many of so many questions `kvcapsule train` holds out unless it is told: 64, or a fifth of fewer than 320."""
    return max(1, min(_MOST_HELD_OUT, questions // 5))


class Stage(NamedTuple):
    """A stage of a training run in which batches go through the model."""

    title: str
    batches: int
    """Through the model."""
    bytes: int
    """Beside the model and the forward of a batch."""


@dataclass(frozen=True)
class TrainingSize:
    """The sizes that the memory of a training run follows from: of the model, tiles, batches and code."""

    layers: int
    """With full attention."""
    query_heads: int
    kv_heads: int
    head_dim: int
    tile: int
    """Visual tokens of a tile."""
    visual: int
    """Visual tokens of a question that are in tiles."""
    batch: int
    """Questions of a batch."""
    element: int
    """Bytes of an element of the model's keys and values."""
    harvest_batches: int
    probe_batches: int = 2
    fisher_batches: int = 12
    measure_batches: int = 16
    together: bool = True
    """Whether keys and values of a layer group are coded as one (cross-layer), or each by itself (transform)."""
    text: int = 64
    """Tokens behind the images of a question, about."""
    group: int = 0
    """Layers of a group; 0: the default."""
    heads: int = 0
    """KV heads of a head group; 0: the default."""

    @property
    def head_group(self) -> int:
        return self.heads or joint_heads(self.kv_heads, self.head_dim)

    @property
    def layer_group(self) -> int:
        wanted = self.group or joint_layers(self.head_group, self.head_dim)
        return min(self.layers, wanted) if self.together else 1

    @property
    def _matrix(self) -> int:
        """Numbers of the matrices along the channels, of all sources: W x W of each head group."""
        width = self.head_dim * self.head_group
        parts, sources = (2 * self.layer_group, -(-self.layers // self.layer_group))
        if not self.together:
            parts, sources = 1, 2 * self.layers
        return sources * (self.kv_heads // self.head_group) * (parts * width) ** 2

    @property
    def _sums(self) -> int:
        """Bytes of all second moments."""
        sets = self.kv_heads // self.head_group
        along = 2 * self.layers * sets * (self.tile * self.head_dim * self.head_group + self.tile**2)
        return _FP64 * (self._matrix + along)

    @property
    def _layer(self) -> int:
        """Elements of a layer's keys and values of a batch."""
        return 2 * self.batch * self.visual * self.kv_heads * self.head_dim

    @property
    def _held(self) -> int:
        """Bytes of the sample of tiles."""
        return min(SAMPLE_BYTES, self.element * self._layer * self.layers * self.harvest_batches)

    @property
    def _group(self) -> int:
        """Bytes of a batch's harvest of one layer group."""
        queries = self.batch * self.text * self.query_heads * self.head_dim
        return self.layer_group * self.element * (self._layer + queries)

    def stages(self) -> list[Stage]:
        """The stages of the closed form and of its measurement, in order."""
        one_set = _FP64 * self._layer * self.layer_group * self.head_group // self.kv_heads
        kept = self._sums + self._held
        bases = 2 * _FP32 * self._matrix
        # Encoder and decoder, in fp32.
        codecs = 2 * _FP32 * self._matrix
        slopes = 4 * _FP32 * self._layer * self.layer_group
        return [
            Stage(HARVEST, self.harvest_batches, kept + self._group + one_set),
            Stage(PROBE, self.probe_batches, kept + 4 * self._group),
            Stage("bases", 0, kept + 2 * bases),
            Stage(FISHER, self.fisher_batches, kept + codecs + _FP64 * self._matrix + 2 * self._group + slopes),
            Stage("bases under the Fisher metric", 0, kept + _FP64 * self._matrix + 2 * bases),
            Stage(MEASURE, self.measure_batches, codecs + 4 * self._group),
        ]
