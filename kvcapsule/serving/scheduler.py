"""A scheduler of vLLM that ends a request's step with each image, for engines with an image store.

What follows an image then reads its capsule whether the image is new or comes from the store, so that both give the
same answer. Where the pool is full when an image ends, what follows reads the image as it is, and that answer may be
another one.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from .image_blocks import tile_blocks
from .scheduler_half import images_of


class CapsuleScheduler(AsyncScheduler):
    """Named by vLLM's option scheduler_cls."""

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """vLLM asks this of each request with images: how many of its next tokens may be computed in the step."""
        end = self._image_end(request, num_computed_tokens)
        tokens = num_new_tokens if end is None else min(num_new_tokens, end - num_computed_tokens)
        scheduled: tuple[list[int], int, int, list[int], list[int]] = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, tokens, *args, **kwargs
        )
        return scheduled

    def _image_end(self, request: Any, computed: int) -> int | None:
        """Where the next image ends that holds a tile."""
        last = request.mm_features[-1].mm_position if request.mm_features else None
        if self.connector is None or last is None or computed >= last.offset + last.length:
            return None
        half = self.connector.scheduler
        if request.num_computed_tokens and request.request_id not in half.requests:
            # Its first image came with a later piece of its input, and vLLM caches the step's blocks before it tells.
            half.resume(request.request_id, images_of(request))
        runs = tile_blocks(images_of(request), half.block, half.tile)
        return next((run.end for run in runs if run.end > computed), None)
