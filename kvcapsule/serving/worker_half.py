"""The connector's half in a worker's process: compresses images, and says which entries attention reads for a batch."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ..capsule.capsule import Capsule
from ..capsule.stored_span import from_bytes, to_bytes
from ..errors import CapsuleError
from ..kernels import attend
from ..segments.pooled_segment import PooledSegment
from ..segments.segment import Segment
from .image_blocks import TileBlocks
from .paged_cache import PagedCache, check_layout
from .pool import CapsulePool, compress_tiles
from .prompt_images import Save
from .rotation import RotaryEmbedding
from .scheduler_half import Compress, Step
from .span_bytes import SpanBytes
from .stats import Tally
from .store_writer import StoreWriter


class RequestCapsules(NamedTuple):
    """The tiles of a request that are in slots of the pool."""

    runs: list[TileBlocks]
    slots: list[int]

    def blocks_left(self, count: int) -> list[int]:
        """Of the first `count` blocks of the request those that no slot stands for."""
        gone = {block for run in self.runs for block in range(run.first_block, run.end_block)}
        return [block for block in range(count) if block not in gone]


class Batch(NamedTuple):
    """A step's rows that read capsules: their tokens, and the entries that all of them read in one call."""

    tokens: torch.Tensor
    """[B]: index of each row's new token among the tokens of the step."""
    tiles: tuple[torch.Tensor, torch.Tensor]
    """[E]: row and slot of each tile."""
    blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """[E]: row, block, and number of written tokens."""


class WorkerHalf:
    """Holds the capsule pool, and the layers' caches."""

    def __init__(
        self,
        capsule: Capsule,
        layers: Sequence[int],
        form: Mapping[int, Segment],
        slots: int,
        rotary: RotaryEmbedding | None,
        block: int,
    ) -> None:
        """form: of a tile (one_tile); block: tokens of a block."""
        self.capsule, self.layers, self.rotary, self.block = capsule, list(layers), rotary, block
        self.pool = CapsulePool(form, slots)
        self.held: dict[str, RequestCapsules] = {}
        self.caches: dict[int, PagedCache] = {}
        self.spans = SpanBytes(capsule, self.layers, self.pool, self.caches, block)
        self.index: dict[str, int] = {}
        """Index in the model of each of vLLM's attention layers, by name."""
        self.step = Step()
        self.tally = Tally()
        self.runner: Any = None
        """vLLM's model runner; set by the worker."""
        self.store: StoreWriter | None = None
        """Where images go, if there is an image store; set by the connector."""

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take vLLM's caches, by the names of its layers."""
        names = sorted(kv_caches, key=lambda name: int(next(iter(re.findall(r"\d+", name)))))
        self.index = dict(zip(names, self.layers, strict=True))
        self.caches.update({self.index[name]: PagedCache(kv_caches[name]) for name in names})
        _, heads, block, both = kv_caches[names[0]].shape
        check_layout(kv_caches[names[0]].dtype, heads, block, both // 2)

    def begin_step(self, step: Step) -> None:
        """A step begins: forget what is gone."""
        self.step = step
        for request in step.forget:
            self.held.pop(request, None)

    @torch.inference_mode()
    def load(self) -> None:
        """The step's tokens are about to be computed: put what comes from the store where attention reads it."""
        for job in self.step.load:
            with self.tally.seconds("store_seconds"):
                blocks, slots, held = self._blocks(job.request), list(job.slots), RequestCapsules([], [])
                for image, data in zip(job.images, job.data, strict=True):
                    tiles = image.run.tiles if image.run is not None else 0
                    span = from_bytes(data, self.capsule)
                    self.spans.put(image, span, slots[:tiles], blocks, job.first)
                    if image.run is not None:
                        held.runs.append(image.run)
                        held.slots.extend(slots[:tiles])
                    slots = slots[tiles:]
                self.held[job.request] = held

    @torch.inference_mode()
    def end_step(self) -> None:
        """The step's tokens are computed: compress the images that end in it."""
        jobs = sorted(self.step.compress, key=lambda job: job.run.tiles)
        for _, same in groupby(jobs, key=lambda job: job.run.tiles):
            alike = list(same)
            with self.tally.seconds("compression_seconds"):
                self._compress(alike)
            self.tally.add("images_compressed", len(alike))
        for save in self.step.save:
            self._save(save)
        self.step = Step()

    def _save(self, job: Save) -> None:
        weights = self.store.weights() if self.store is not None else None
        if self.store is None or weights is None:
            return
        with self.tally.seconds("store_seconds"):
            try:
                span = self.spans.take(job.image, job.slots, self._blocks(job.request), weights)
                data = to_bytes(span, self.capsule)
            except CapsuleError as error:
                self.store.refuse(error)
                return
        if self.store.put(job.image, data):
            self.tally.add("store_written_bytes", len(data))

    def _compress(self, jobs: list[Compress]) -> None:
        blocks = torch.stack([self._blocks(job.request)[job.run.first_block : job.run.end_block] for job in jobs])
        rotation = None
        if self.rotary is not None:
            at = [self._positions(job.request, job.run) for job in jobs]
            rotation = self.rotary.at(torch.stack(at, dim=-2))
        segments = compress_tiles(self.capsule, self.layers, lambda layer: self.caches[layer].read(blocks), rotation)
        self.pool.put([slot for job in jobs for slot in job.slots], segments)
        for job in jobs:
            held = self.held.setdefault(job.request, RequestCapsules([], []))
            held.runs.append(job.run)
            held.slots.extend(job.slots)

    def _blocks(self, request: str) -> torch.Tensor:
        (blocks,) = self.runner.requests[request].block_ids
        return torch.tensor(blocks)

    def _positions(self, request: str, run: TileBlocks) -> torch.Tensor:
        """[N] or [3, N]: the positions of an image's tiles as the model counts them."""
        assert self.rotary is not None
        first, last = run.first_block * self.block, run.end_block * self.block
        if self.rotary.axes == 1:
            return torch.arange(first, last)
        positions: torch.Tensor = self.runner.requests[request].mrope_positions[:, first:last]
        return positions

    def rows(self, count: int) -> list[tuple[int, RequestCapsules]]:
        """The first `count` rows of the step's batch that have something compressed."""
        if not self.held:
            return []
        names = self.runner.input_batch.req_ids[:count]
        return [(row, self.held[name]) for row, name in enumerate(names) if name in self.held]

    def batch(
        self, rows: Sequence[tuple[int, RequestCapsules]], lengths: Sequence[int], starts: Sequence[int]
    ) -> Batch:
        """What rows with one new token each read.

        Args:
            rows: of the step's batch, with what is held of each.
            lengths: tokens of each row of the step's batch, the new one included.
            starts: where each row's tokens begin among those of the step.
        """
        tables = self.runner.input_batch.block_table[0].get_numpy_array()
        slots, tile_rows, blocks, block_rows, counts = [], [], [], [], []
        for i, (row, held) in enumerate(rows):
            slots += held.slots
            tile_rows += [i] * len(held.slots)
            left = held.blocks_left(-(-lengths[row] // self.block))
            blocks += tables[row, left].tolist()
            block_rows += [i] * len(left)
            counts += [self.block] * (len(left) - 1) + [(lengths[row] - 1) % self.block + 1]
        tensors = [torch.tensor(x) for x in (tile_rows, slots, block_rows, blocks, counts)]
        tokens = torch.tensor([starts[row] for row, _ in rows])
        return Batch(tokens, (tensors[0], tensors[1]), (tensors[2], tensors[3], tensors[4]))

    def attend(self, layer: str, query: torch.Tensor, batch: Batch, scale: float) -> torch.Tensor:
        """Attention of rows with one new token each, [B, heads, D] to the same, over capsules and blocks at once."""
        index = self.index[layer]
        segments = [
            PooledSegment.of(self.pool.layers[index], *batch.tiles),
            PooledSegment.of(self.caches[index].segment, *batch.blocks),
        ]
        return attend(query[:, :, None], segments, scale)[:, :, 0]

    def attend_row(
        self, layer: str, query: torch.Tensor, row: int, held: RequestCapsules, length: int, scale: float
    ) -> torch.Tensor:
        """Attention of a row with several new tokens, its last: [Q, heads, D] to the same.

        Args:
            layer: name of vLLM's layer.
            query: of the new tokens.
            row: of the step's batch.
            held: what is compressed of its request.
            length: tokens of the row, the new ones included.
            scale: factor of the scores.
        """
        index, new = self.index[layer], len(query)
        left = held.blocks_left(-(-length // self.block))
        table = torch.tensor(self.runner.input_batch.block_table[0].get_numpy_array()[row, left])
        keys, values = self.caches[index].read(table[None].long())
        at = (torch.tensor(left)[:, None] * self.block + torch.arange(self.block)).flatten()
        at = at[at < length]
        owner = torch.zeros(1, dtype=torch.long)
        tail = Segment(keys[:, :, : len(at)], values[:, :, : len(at)], owner, each_row=True)
        visible = at <= torch.arange(length - new, length)[:, None]
        slots = torch.tensor(held.slots)
        capsules = PooledSegment.of(self.pool.layers[index], torch.zeros_like(slots), slots)
        return attend(query.transpose(0, 1)[None], [capsules, tail], scale, visible[None])[0].transpose(0, 1)
