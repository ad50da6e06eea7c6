"""Images of requests out of the capsule pool and the paged cache as stored spans, and back."""

from collections.abc import Mapping, Sequence

import torch

from ..capsule.capsule import Capsule
from ..capsule.digest import capsule_digest
from ..capsule.span_form import raw
from ..capsule.span_header import SpanHeader, dtype_name, frame_name
from ..capsule.stored_span import StoredSpan
from ..codec.base import TILES
from ..segments.memo import Memo
from ..segments.segment import Segment
from .paged_cache import PagedCache
from .pool import CapsulePool
from .prompt_images import PromptImage


class SpanBytes:
    """What stored spans are made of in a worker, and where their parts go.

    Args:
        capsule: of the engine.
        layers: that are compressed.
        pool: with the tiles.
        caches: the blocks of each layer.
        block: tokens of a block.
    """

    def __init__(
        self,
        capsule: Capsule,
        layers: Sequence[int],
        pool: CapsulePool,
        caches: Mapping[int, PagedCache],
        block: int,
    ) -> None:
        self.capsule, self.layers, self.pool, self.caches, self.block = capsule, layers, pool, caches, block

    def take(self, image: PromptImage, slots: Sequence[int], blocks: torch.Tensor, weights: str) -> StoredSpan:
        """An image as a stored span.

        Args:
            image: which.
            slots: of its tiles.
            blocks: of its request.
            weights: digest of the model's.
        """
        config, memo = self.capsule.config, Memo()
        index, owner = torch.tensor(slots, dtype=torch.int64), torch.zeros(len(slots), dtype=torch.int64)
        visual: dict[int, list[Segment]] = {}
        text: dict[int, list[Segment]] = {}
        for layer in self.layers:
            rest = self._read(layer, image.raw(self.block), blocks)
            tiles = [self.pool.layers[layer].entries(index, owner, memo)] if len(slots) else []
            visual[layer] = [*tiles, *rest]
            text[layer] = self._read(layer, range(image.first, image.start), blocks)
        first = visual[self.layers[0]][0]
        header = SpanHeader(
            capsule=capsule_digest(self.capsule),
            family=config.family,
            base_model=config.base_model,
            dtype=dtype_name(self.caches[self.layers[0]].dtype),
            # vLLM's scheduler does not know the grid; nothing that reads a span needs it.
            grid=(1, 1, image.length),
            tile=config.codec.tile,
            align=self.block,
            frame=frame_name(first.frame),
            start=image.start,
            length=image.length,
            text=image.text,
            layers=tuple(self.layers),
            weights=weights,
        )
        return StoredSpan(header, visual, text)

    def put(self, image: PromptImage, span: StoredSpan, slots: Sequence[int], blocks: torch.Tensor, first: int) -> None:
        """Write a span's tiles into slots, and its raw rows into blocks.

        Args:
            image: which.
            span: its.
            slots: for its tiles.
            blocks: of its request.
            first: position of the first token that is written; blocks of those before it may be other requests' too.
        """
        tiles = {layer: segments[0] for layer, segments in span.visual.items() if segments[0].tag == TILES}
        if tiles:
            self.pool.put(slots, tiles)
        for layer in self.layers:
            for segment, at in (
                (span.text[layer], list(range(image.first, image.start))),
                ([s for s in span.visual[layer] if s.tag != TILES], image.raw(self.block)),
            ):
                skipped = sum(position < first for position in at)
                if at[skipped:]:
                    (rows,) = segment
                    self.caches[layer].write(*self._places(at[skipped:], blocks), rows, skipped)

    def _read(self, layer: int, positions: Sequence[int], blocks: torch.Tensor) -> list[Segment]:
        if not positions:
            return []
        return [raw(*self.caches[layer].rows(*self._places(positions, blocks)))]

    def _places(self, positions: Sequence[int], blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.tensor(positions)
        return blocks[at // self.block], at % self.block
