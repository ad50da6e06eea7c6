"""What is measured of the answers: bytes of the cache right after the prefill, seconds of prefill and decoding."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvcapsule.vlm.geometry import KVGeometry, full_attention_layers

from ..equal_bytes import Layout
from ..watched_generate import StoredBytes, stored_bytes


class BatchMeasure(NamedTuple):
    """What is measured of one batch of questions."""

    visual_tokens: list[int]
    """Of each question."""
    new_tokens: list[int]
    """Of each answer, the end token included."""
    stored: StoredBytes
    """Bytes of the cache after the prefill."""
    full_visual: int
    """Bytes of the visual tokens in the full cache, once for each beam."""
    prefill: float
    """Seconds from the call of generate to the first logits: the vision tower, the prefill and the compression."""
    decode: float
    """Seconds of all later tokens."""

    @property
    def questions(self) -> int:
        return len(self.visual_tokens)


class PrefillWatch(LogitsProcessor):
    """Measures the cache when the first logits arrive, as it then holds only the prompt, and notes the time."""

    def __init__(self, model: PreTrainedModel, cache: Cache, layout: Layout) -> None:
        self.device, self.cache, self.layout = model.device, cache, layout
        self.stored: StoredBytes | None = None
        self.beams = 1
        self.begin = self.first = self._now()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.stored is None:
            self.first = self._now()
            self.beams = len(input_ids) // len(self.layout.valid)
            self.stored = stored_bytes(self.cache, self.layout)
            # Counting bytes is no part of decoding.
            self.begin += self._now() - self.first
            self.first = self._now()
        return scores

    def measure(self, new_tokens: Sequence[int], token_bytes: int) -> BatchMeasure:
        """After generate. `token_bytes`: of a token in the full cache."""
        end = self._now()
        assert self.stored is not None
        counts = [0] * len(self.layout.valid)
        for span in self.layout.spans:
            counts[span.row] += span.length
        full = sum(counts) * self.beams * token_bytes
        return BatchMeasure(counts, list(new_tokens), self.stored, full, self.first - self.begin, end - self.first)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def full_token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers with full attention."""
    geometry = KVGeometry.from_config(config)
    return 2 * len(full_attention_layers(config)) * geometry.kv_heads * geometry.head_dim * dtype.itemsize


def means(batches: Sequence[BatchMeasure]) -> dict[str, float]:
    """Means over all questions, by their names in the result file of lmms-eval (with "avg_" in front)."""
    questions = sum(batch.questions for batch in batches)
    sums = {
        "visual_tokens": sum(sum(batch.visual_tokens) for batch in batches),
        "visual_kv_bytes": sum(batch.stored.visual for batch in batches),
        "full_visual_kv_bytes": sum(batch.full_visual for batch in batches),
        "kv_bytes": sum(batch.stored.total for batch in batches),
        "prefill_seconds": sum(batch.prefill for batch in batches),
        "decode_seconds": sum(batch.decode for batch in batches),
    }
    return {name: total / max(1, questions) for name, total in sums.items()}


def summary(batches: Sequence[BatchMeasure]) -> str:
    """The measures in one line."""
    mean, questions = means(batches), sum(batch.questions for batch in batches)
    return (
        f"{questions} questions; a question, on average: {mean['visual_kv_bytes']:,.0f} bytes of visual KV"
        f" ({mean['full_visual_kv_bytes']:,.0f} in the full cache), {mean['prefill_seconds']:.3f} s of prefill,"
        f" {mean['decode_seconds']:.3f} s of decoding."
    )
