"""A memory budget divided between the blocks of the KV cache and the capsule pool, so that most sequences run at once.

Arithmetic alone: no torch, no vLLM. A sequence's image gives tiles that lie in whole blocks; a tile's blocks are given
back for one slot of the pool. While an image is computed its request holds all of its blocks.
"""

from dataclasses import dataclass
from math import ceil

from ..errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """Sizes of what memory is divided into: blocks, and slots of tiles."""

    block: int
    """Tokens of a block."""
    block_bytes: int
    """Of all layers."""
    tile: int
    """Tokens of a tile, a multiple of block."""
    slot_bytes: int
    """Of a tile as a capsule, in all layers."""


@dataclass(frozen=True)
class Form:
    """What an expected sequence holds, prompt and answer."""

    image_tokens: int
    """Of its images together."""
    text_tokens: int
    images: int = 1

    def tiles(self, sizes: Sizes) -> int:
        """Tiles of its images at least, wherever in a block they begin."""
        image = self.image_tokens // self.images
        return self.images * max(0, (image - sizes.block + 1) // sizes.tile)

    def blocks(self, sizes: Sizes) -> int:
        """Blocks without capsules."""
        return ceil((self.image_tokens + self.text_tokens) / sizes.block)

    def blocks_left(self, sizes: Sizes) -> int:
        """Blocks that it holds once its images are compressed."""
        return self.blocks(sizes) - self.tiles(sizes) * sizes.tile // sizes.block

    def bytes(self, sizes: Sizes) -> int:
        """Bytes that it takes without capsules."""
        return self.blocks(sizes) * sizes.block_bytes

    def bytes_left(self, sizes: Sizes) -> int:
        """Bytes that it takes with capsules: blocks and slots."""
        return self.blocks_left(sizes) * sizes.block_bytes + self.tiles(sizes) * sizes.slot_bytes


@dataclass(frozen=True)
class Budget:
    """How a memory budget is divided, and how many sequences that lets run."""

    blocks: int
    slots: int
    sequences: int
    """At once, with capsules."""
    without: int
    """At once in the same memory without capsules."""

    def block_bytes(self, sizes: Sizes) -> int:
        return self.blocks * sizes.block_bytes

    def pool_bytes(self, sizes: Sizes) -> int:
        return self.slots * sizes.slot_bytes


NULL_BLOCKS = 1
"""Blocks that vLLM keeps for itself."""


def divide(total: int, sizes: Sizes, form: Form, share: float | None = None) -> Budget:
    """Blocks and slots that fit into `total` bytes.

    Args:
        total: bytes for both.
        sizes: of a block and a slot.
        form: of the sequences that are expected.
        share: part of the bytes that the pool gets; None: what lets the most sequences run.

    Raises:
        ConfigError: if not one sequence fits, or capsules would save nothing.
    """
    if form.tiles(sizes) == 0:
        raise ConfigError(
            f"an image of {form.image_tokens // form.images} tokens holds no tile of {sizes.tile} tokens in whole"
            f" blocks of {sizes.block}: capsules would save nothing. Take a capsule of smaller tiles, or larger images."
        )
    freed = sizes.tile // sizes.block * sizes.block_bytes
    if share is None and sizes.slot_bytes > freed:
        raise ConfigError(
            f"a tile takes {sizes.slot_bytes:,} bytes as a capsule and {freed:,} in blocks: this capsule saves nothing"
            " (give --pool-share to serve with it all the same)."
        )
    slots = _best_slots(total, sizes, form) if share is None else int(total * share) // sizes.slot_bytes
    blocks = (total - slots * sizes.slot_bytes) // sizes.block_bytes
    most = sequences(blocks, slots, sizes, form)
    if most < 1:
        least = (form.blocks(sizes) + NULL_BLOCKS) * sizes.block_bytes
        raise ConfigError(
            f"{total:,} bytes hold no sequence of {form.image_tokens} visual and {form.text_tokens} other tokens: give"
            f" --memory-bytes {least} at least{'' if share is None else ', or another --pool-share'}."
        )
    return Budget(blocks, slots, most, _without(total, sizes, form))


def of_engine(blocks: int, slots: int, sizes: Sizes, form: Form) -> Budget:
    """The budget of an engine that has so many blocks and slots."""
    total = blocks * sizes.block_bytes + slots * sizes.slot_bytes
    return Budget(blocks, slots, sequences(blocks, slots, sizes, form), _without(total, sizes, form))


def _without(total: int, sizes: Sizes, form: Form) -> int:
    """Sequences at once in so many bytes of blocks alone."""
    return max(0, total // sizes.block_bytes - NULL_BLOCKS) // form.blocks(sizes)


def sequences(blocks: int, slots: int, sizes: Sizes, form: Form) -> int:
    """How many sequences of a form run at once: the last to come needs all of its blocks until its image is computed;
    images that find no slot stay in their blocks."""
    free, full, left = blocks - NULL_BLOCKS, form.blocks(sizes), form.blocks_left(sizes)
    compressed = min(slots // form.tiles(sizes), (free - full) // max(left, 1) + 1 if free >= full else 0)
    return compressed + max(0, free - compressed * left) // full


def _best_slots(total: int, sizes: Sizes, form: Form) -> int:
    """Every sequence has its slots, and no slot is left over. More sequences never need fewer slots: the largest number
    that fits is the best."""
    spare = total - (NULL_BLOCKS + form.blocks(sizes) - form.blocks_left(sizes)) * sizes.block_bytes
    count = max(0, spare // form.bytes_left(sizes))
    return count * form.tiles(sizes)


def summary(sizes: Sizes, form: Form, budget: Budget, layers: tuple[int, int]) -> list[str]:
    """Lines about a memory budget, for logs.

    Args:
        sizes: of a block and a slot.
        form: of the sequences that are expected.
        budget: what there is.
        layers: how many are compressed, and how many the model has.
    """
    return [
        f"{layers[0]} of {layers[1]} layers are compressed",
        f"{budget.slots:,} capsule slots of {sizes.tile} tokens take {budget.pool_bytes(sizes):,} bytes, beside"
        f" {budget.blocks:,} blocks of {sizes.block} tokens in {budget.block_bytes(sizes):,} bytes",
        f"a sequence of {form.image_tokens} visual and {form.text_tokens} other tokens takes"
        f" {form.bytes_left(sizes):,} bytes, and {form.bytes(sizes):,} without capsules",
        f"{budget.sequences:,} such sequences run at once, and {budget.without:,} in the same memory without capsules",
    ]
