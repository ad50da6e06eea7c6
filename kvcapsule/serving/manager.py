"""The KV cache manager of vLLM's scheduler that frees the blocks of compressed images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .image_blocks import TileBlocks
from .scheduler_half import SchedulerHalf


@dataclass(frozen=True, kw_only=True)
class CapsuleSpec(FullAttentionSpec):
    """The KV cache of layers whose images are compressed."""


class CapsuleManager(FullAttentionManager):
    """Gives back the blocks that lie wholly within an image once it is compressed, from the middle of a request."""

    capsules: SchedulerHalf | None = None
    """Set by the connector."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """As vLLM counts; the blocks of images that come from the store are not needed."""
        count: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            **kwargs,
        )
        loads = num_local_computed_tokens < total_computed_tokens and request_id not in self.num_cached_block
        return count - len(self._spared(request_id, len(new_computed_blocks), loads))

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Blocks for what comes from the store; the null block stands for those that lie in tiles."""
        blocks = self.req_to_blocks[request_id]
        spared = self._spared(request_id, len(blocks), num_external_computed_tokens > 0)
        total = cdiv(num_local_computed_tokens + num_external_computed_tokens, self.block_size)
        new = self.block_pool.get_new_blocks(max(0, total - len(blocks) - len(spared)))
        if self._record_new_block_ids and record_for_zeroing:
            self.new_block_ids.extend(block.block_id for block in new)
        left = iter(new)
        for index in range(len(blocks), total):
            blocks.append(self._null_block if index in spared else next(left))

    def _spared(self, request_id: str, first: int, loads: bool) -> set[int]:
        """The blocks, from the first on, that lie in tiles which the request gets from the store."""
        runs = self.capsules.loading(request_id) if self.capsules is not None and loads else ()
        return {block for run in runs for block in range(run.first_block, run.end_block) if block >= first}

    def _give_back(self, request_id: str, run: TileBlocks) -> None:
        """Free an image's blocks. Those at its end may be null already, while others came from the prefix cache."""
        blocks = self.req_to_blocks.get(request_id)
        if blocks is None or len(blocks) <= run.first_block or blocks[run.first_block] is self._null_block:
            return
        at = [i for i in range(run.first_block, min(run.end_block, len(blocks))) if blocks[i] is not self._null_block]
        freed = [blocks[i] for i in reversed(at)]
        for i in at:
            blocks[i] = self._null_block
        self.block_pool.free_blocks(freed)

    def new_step_starts(self) -> None:
        """Free the blocks of compressed images before any request is scheduled: one that comes earlier may need blocks,
        and would otherwise preempt the request that these belong to. No step is in flight here, as steps are not
        scheduled ahead (settings.refuse_unsupported)."""
        super().new_step_starts()
        if self.capsules is None:
            return
        for request in self.capsules.requests:
            for run in self.capsules.compressed(request):
                self._give_back(request, run)

    def cache_blocks(
        self, request: Any, num_tokens: int, retention_interval: int | None = None, *, replay_boundaries: Sequence[int]
    ) -> None:
        """What was computed behind a compressed image never enters the prefix cache: its hashes stand for exact KV."""
        exact = None if self.capsules is None else self.capsules.exact_tokens(request.request_id)
        tokens = num_tokens if exact is None else min(num_tokens, exact)
        super().cache_blocks(request, tokens, retention_interval, replay_boundaries=replay_boundaries)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """A request that ends, or is preempted, gives its slots back with its blocks."""
        if self.capsules is not None:
            self.capsules.end(request_id)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks
