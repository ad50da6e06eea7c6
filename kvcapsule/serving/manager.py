"""The KV cache manager of vLLM's scheduler that frees the blocks of compressed images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .scheduler_half import SchedulerHalf


@dataclass(frozen=True, kw_only=True)
class CapsuleSpec(FullAttentionSpec):
    """The KV cache of layers whose images are compressed."""


class CapsuleManager(FullAttentionManager):
    """Gives back the blocks that lie wholly within an image once it is compressed, from the middle of a request."""

    capsules: SchedulerHalf | None = None
    """Set by the connector."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks of the images that lie within these tokens and are compressed."""
        if self.capsules is None:
            return
        for run in self.capsules.compressed(request_id):
            if run.end <= processed_computed_tokens:
                self._remove_blocks_in_range(request_id, run.first_block, run.last_block)

    def new_step_starts(self) -> None:
        """Free them before any request is scheduled: one that comes earlier may need them, and would otherwise preempt
        the request whose blocks they are. No step is in flight here, as steps are not scheduled ahead
        (settings.refuse_unsupported)."""
        super().new_step_starts()
        if self.capsules is None:
            return
        for request in self.capsules.requests:
            for run in self.capsules.compressed(request):
                self._remove_blocks_in_range(request, run.first_block, run.last_block)

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
