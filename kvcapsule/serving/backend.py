"""vLLM's CPU attention, and for rows whose images are compressed attention over capsules and blocks in one pass.

vLLM's CPU kernel gives no log-sum-exp by which its result over the blocks could be merged with that over the capsules.
So rows with capsules are read whole by this project's kernels, blocks where they lie; nothing is read twice. vLLM's
kernel is called for the other rows alone.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

from ..errors import ConfigError
from .connector import CapsuleConnector
from .manager import CapsuleSpec
from .paged_cache import readable_isa
from .worker_half import Batch, RequestCapsules, WorkerHalf


class _Plan(NamedTuple):
    """Who reads which rows of a step."""

    engine: CPUAttentionMetadata | None
    """For vLLM's kernel; None where it has nothing to read."""
    batch: Batch | None
    """Rows with capsules and one new token."""
    single: list[tuple[int, RequestCapsules, int, int, int]]
    """Rows with capsules and several: row, what is held, first and last token among those of the step, length."""


class CapsuleMetadataBuilder(CPUAttentionMetadataBuilder):
    """Chooses kernels whose blocks can be read, and keeps what it needs to make metadata for some of a step's rows."""

    isa: str
    """Set of kernels of vLLM's CPU backend."""

    def _set_isa_to_layers(self, layer_names: list[str]) -> None:
        if CapsuleBackend.chosen:
            self.isa = readable_isa(self.isa)
        super()._set_isa_to_layers(layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.builder = self
        return metadata

    def for_lengths(self, metadata: CPUAttentionMetadata, lengths: torch.Tensor) -> CPUAttentionMetadata:
        """The same step with rows of other lengths."""
        scheduled = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return replace(metadata, seq_lens=lengths, scheduler_metadata=scheduled)


class CapsuleImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unread = {
            "softcapping": self.logits_soft_cap or None,
            "ALiBi": self.alibi_slopes,
            "attention sinks": self.sinks,
        }
        if CapsuleBackend.chosen and (names := [name for name, value in unread.items() if value is not None]):
            raise ConfigError(f"capsules in vLLM do not work with models whose attention has {names[0]} yet.")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        **outputs: Any,
    ) -> torch.Tensor:
        """As CPUAttentionBackendImpl.forward. outputs: `output`, and scales of it that the CPU does not use."""

        def engine(metadata: CPUAttentionMetadata | None) -> torch.Tensor:
            out: torch.Tensor = super(CapsuleImpl, self).forward(
                layer, query, key, value, kv_cache, metadata, **outputs
            )
            return out

        worker = _worker()
        if attn_metadata is None or worker is None or layer.layer_name not in worker.index:
            return engine(attn_metadata)
        plan = _plan(worker, attn_metadata)
        output: torch.Tensor = outputs["output"]
        if plan.engine is not None:
            engine(plan.engine)
        if plan.batch is None and not plan.single:
            return output
        with worker.tally.seconds("reading_seconds"):
            if plan.batch is not None:
                out = worker.attend(layer.layer_name, query[plan.batch.tokens], plan.batch, self.scale)
                output[plan.batch.tokens] = out.reshape(len(out), *output.shape[1:])
            for row, held, first, last, length in plan.single:
                out = worker.attend_row(layer.layer_name, query[first:last], row, held, length, self.scale)
                output[first:last] = out.reshape(len(out), *output.shape[1:])
        return output


class CapsuleBackend(CPUAttentionBackend):
    """vLLM's CPU backend where no capsule was asked for."""

    chosen = False
    """Whether this process's worker serves with capsules; set by CapsuleWorker."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CapsuleImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CapsuleMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The spec of a layer's KV cache, so that CapsuleManager manages it."""
        if cls.chosen and type(spec) is FullAttentionSpec and spec.sliding_window is None:
            return replace_as(spec, CapsuleSpec)
        return super().customize_spec(spec)


def _worker() -> WorkerHalf | None:
    if not has_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    return connector.worker if isinstance(connector, CapsuleConnector) else None


def _plan(worker: WorkerHalf, metadata: CPUAttentionMetadata) -> _Plan:
    """Made by the first layer of a step, for all."""
    known: _Plan | None = getattr(metadata, "plan", None)
    if known is None:
        known = metadata.plan = _make_plan(worker, metadata)
    return known


def _make_plan(worker: WorkerHalf, metadata: CPUAttentionMetadata) -> _Plan:
    count = len(metadata.seq_lens)
    rows = worker.rows(count)
    if not rows:
        return _Plan(metadata, None, [])
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    one = [(row, held) for row, held in rows if starts[row + 1] - starts[row] == 1]
    several = [
        (row, held, starts[row], starts[row + 1], lengths[row])
        for row, held in rows
        if starts[row + 1] - starts[row] > 1
    ]
    engine = None
    if len(rows) < count:
        # vLLM's kernel takes no part of a batch: of the other rows it reads the new tokens alone, for nothing.
        shorter = metadata.seq_lens.clone()
        for row, _ in rows:
            shorter[row] = starts[row + 1] - starts[row]
        engine = metadata.builder.for_lengths(metadata, shorter)
    return _Plan(engine, worker.batch(one, lengths, starts) if one else None, several)
