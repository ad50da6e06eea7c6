"""Upper bound of the decode speed-up with a compressed cache, from bytes alone: no model is run, nothing is measured.

A decode step reads the weights once and the cache of every sequence. If it is bound by nothing but these bytes, a batch
of B goes

    S = (W + B (F + T)) / (W + B (F / c + T))

times as fast with capsules: W bytes of weights that a step reads, F and T bytes of the visual tokens and the text of
one sequence, c times less for the visual tokens. Whatever else takes time is the same on both sides or more with
capsules, so S is an upper bound at equal batch; a loose one for a cross-layer code, all of which each layer of a stack
reads. At batch 1 it is near 1 wherever weights outweigh the cache.
"""

from dataclasses import dataclass

REFERENCE_BYTES = 2
"""Bytes of an element at 16 bits, which compression is counted against whatever the precision of the cache, as in
`kvcapsule train --compression`."""
SCALE_BITS = {16: 0.0, 8: 0.0, 4: 0.25}
"""Bits of scales for each weight, by the bits of a weight: at 4 bits a scale and a minimum of 16 bits for every 128
weights; at 8 a scale a row, which is next to nothing."""


@dataclass(frozen=True)
class Cache:
    """Bytes of one sequence's cache, in the layers with full attention."""

    visual: float
    """Bytes of the visual tokens: F, and F / c as capsules."""
    text: float
    """Bytes of all other tokens."""

    @property
    def total(self) -> float:
        return self.visual + self.text


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters of a model, by how they are stored and read."""

    read_matrices: float
    """Quantised ones that a decode step reads: the matrices of the decoder layers, of experts only those of one
    token."""
    read_others: float
    """Others that it reads: output head, norms, biases."""
    held_matrices: float
    """All quantised ones, all experts included."""
    held_others: float
    """All others: embeddings and the vision tower too."""

    def read_bytes(self, element: int, bits: int | None = None) -> float:
        """W. `element`: bytes of a parameter that is not quantised; `bits`: a key of SCALE_BITS, None to quantise
        nothing."""
        return self.read_matrices * _matrix_bytes(element, bits) + self.read_others * element

    def held_bytes(self, element: int, bits: int | None = None) -> float:
        """Bytes of all parameters in memory."""
        return self.held_matrices * _matrix_bytes(element, bits) + self.held_others * element


def full_cache(token: int, visual: int, text: int) -> Cache:
    """The cache without capsules. `token`: bytes of one token's keys and values over all layers; `visual`, `text`:
    tokens of a sequence."""
    return Cache(token * visual, token * text)


def capsule_cache(full: Cache, element: int, compression: float) -> Cache:
    """The cache with visual tokens in `compression` times fewer bytes than at 16 bits, and the same text.

    Args:
        element: bytes of an element of `full`.
    """
    return Cache(full.visual * REFERENCE_BYTES / element / compression, full.text)


def speedup_bound(weights: float, full: Cache, capsule: Cache, batch: int) -> float:
    """S: tokens/s with capsules over tokens/s without, at most, at this batch. `weights`: bytes that a step reads."""
    return (weights + batch * full.total) / (weights + batch * capsule.total)


def speedup_limit(full: Cache, capsule: Cache) -> float:
    """The limit of S as the batch grows; below c because the text is not compressed."""
    return full.total / capsule.total


def largest_batch(memory: float, held: float, cache: Cache) -> int:
    """Sequences whose caches fit into `memory` bytes beside `held` bytes of weights; 0 where none does."""
    return max(0, int((memory - held) // cache.total))


def _matrix_bytes(element: int, bits: int | None) -> float:
    return element if bits is None else (bits + SCALE_BITS[bits]) / 8
