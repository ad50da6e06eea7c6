"""What a compressed cache can give at most, from bytes alone: no model is run, and nothing here is measured.

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
"""Of an element at 16 bits: what a ratio counts from, whatever the cache is held in, as in `kvcapsule train
--ratio`."""
SCALE_BITS = {16: 0.0, 8: 0.0, 4: 0.25}
"""Bits a weight beside its own: at 4 bits a scale and a zero of 16 bits for every 128; at 8 a scale a row, which is
nothing."""


@dataclass(frozen=True)
class Cache:
    """Bytes of one sequence's cache; those of its layers with full attention."""

    visual: float
    """Of the visual tokens: F, and F / c as capsules."""
    text: float
    """Of all other tokens."""

    @property
    def total(self) -> float:
        return self.visual + self.text


@dataclass(frozen=True)
class Weights:
    """Parameters of a model, by how they are stored and read."""

    read_matrices: float
    """Those that a decode step reads and that are quantised: the matrices of the decoder layers, of experts only those
    of one token."""
    read_others: float
    """Those that it reads as they are: output head, norms, biases."""
    held_matrices: float
    """Those that are quantised, all experts included."""
    held_others: float
    """All that stay as they are: embeddings and the vision tower too."""

    def read_bytes(self, element: int, bits: int | None = None) -> float:
        """W. `element`: bytes of a parameter that is not quantised; `bits`: a key of SCALE_BITS, None to quantise
        nothing."""
        return self.read_matrices * _matrix_bytes(element, bits) + self.read_others * element

    def held_bytes(self, element: int, bits: int | None = None) -> float:
        """What the whole model takes in memory."""
        return self.held_matrices * _matrix_bytes(element, bits) + self.held_others * element


def full_cache(token: int, visual: int, text: int) -> Cache:
    """The cache without capsules. `token`: bytes of one token's keys and values over all layers; `visual`, `text`:
    tokens of a sequence."""
    return Cache(token * visual, token * text)


def capsule_cache(full: Cache, element: int, ratio: float) -> Cache:
    """The cache whose visual tokens take `ratio` times less than at 16 bits; the text stays as it is.

    Args:
        element: bytes of an element of `full`.
    """
    return Cache(full.visual * REFERENCE_BYTES / element / ratio, full.text)


def speedup_bound(weights: float, full: Cache, capsule: Cache, batch: int) -> float:
    """S: tokens/s with capsules over tokens/s without, at most, at this batch. `weights`: bytes that a step reads."""
    return (weights + batch * full.total) / (weights + batch * capsule.total)


def speedup_limit(full: Cache, capsule: Cache) -> float:
    """What S goes towards as the batch grows; the text is what keeps it from c."""
    return full.total / capsule.total


def largest_batch(memory: float, held: float, cache: Cache) -> int:
    """Sequences whose caches fit into `memory` bytes beside `held` bytes of weights; 0 where none does."""
    return max(0, int((memory - held) // cache.total))


def _matrix_bytes(element: int, bits: int | None) -> float:
    return element if bits is None else (bits + SCALE_BITS[bits]) / 8
