"""CapsuleConnector: vLLM's KV connector as the control plane of capsules, one object in the scheduler and one in each
worker."""

from typing import Any

from vllm.config import set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger

from ..capsule.capsule import Capsule
from ..capsule.span_header import dtype_name
from ..errors import ConfigError
from ..inference.transformers_api import require_supported_transformers
from ..vlm.geometry import KVGeometry, full_attention_layers
from .budget import Form, Sizes, of_engine, summary
from .known_images import KnownImages
from .manager import CapsuleManager
from .metrics import CapsuleMetrics, CapsuleStats
from .pool import one_tile, slot_bytes
from .rotation import RotaryEmbedding
from .scheduler_half import SchedulerHalf, Step, images_of
from .settings import Settings, refuse_unsupported
from .store_settings import open_store, require_cuts, store_facts
from .store_writer import StoreWriter
from .version import require_supported_vllm
from .worker_half import WorkerHalf

logger = init_logger(f"vllm.{__name__}")


class StepMetadata(KVConnectorMetadata):
    """What workers are told of a step, as vLLM carries it."""

    def __init__(self, step: Step) -> None:
        self.step = step


class CapsuleConnector(KVConnectorBase_V1):
    """Says when an image is computed, has it compressed, and forgets it with its request."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        require_supported_vllm()
        require_supported_transformers()
        refuse_unsupported(vllm_config)
        groups = kv_cache_config.kv_cache_groups
        config = vllm_config.model_config.hf_config
        layers = full_attention_layers(config)
        if len(groups) != 1 or len(groups[0].layer_names) != len(layers):
            raise ConfigError(
                f"capsules in vLLM do not work with models of several kinds of layers yet: {config.model_type}."
            )
        settings = Settings.of(vllm_config)
        capsule = Capsule.from_pretrained(settings.capsule)
        capsule.require_geometry(KVGeometry.from_config(config))
        tile, block = capsule.config.codec.tile, vllm_config.cache_config.block_size
        if tile % block:
            raise ConfigError(
                f"the capsule's tiles of {tile} tokens are no multiple of the engine's block size {block}, so that no"
                f" block could be given back: pass --block-size, or train a capsule with --codec.align {block}."
            )
        # Where vLLM runs transformers' own model, it has wrapped the model's class, which asks for this.
        with set_current_vllm_config(vllm_config):
            rotary = RotaryEmbedding(config) if capsule.config.geometry.rotary != "none" else None
        rotation = rotary.first(tile) if rotary else None
        empty = one_tile(capsule, layers, vllm_config.model_config.dtype, rotation)
        self.slot_bytes = slot_bytes(empty)
        slots = settings.pool_bytes // self.slot_bytes
        if slots < 1:
            raise ConfigError(f"pool_bytes {settings.pool_bytes}: one tile takes {self.slot_bytes} bytes.")
        if role == KVConnectorRole.SCHEDULER:
            sizes = Sizes(block, len(layers) * groups[0].kv_cache_spec.page_size_bytes, tile, self.slot_bytes)
            form = Form(max(settings.image_tokens, tile + block - 1), settings.text_tokens)
            budget = of_engine(kv_cache_config.num_blocks, slots, sizes, form)
            counts = len(layers), config.get_text_config(decoder=True).num_hidden_layers
            for line in summary(sizes, form, budget, counts):
                logger.info("Capsules: %s.", line)
        self.scheduler: SchedulerHalf | None = None
        self.worker: WorkerHalf | None = None
        self.known: KnownImages | None = None
        opened = open_store(settings, vllm_config)
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerHalf(block, tile, slots)
            if opened is not None:
                require_cuts(vllm_config)
                dtype, facts = dtype_name(vllm_config.model_config.dtype), store_facts(vllm_config)
                store, files = opened
                self.known = KnownImages(store, capsule, block, layers, dtype, facts, files)
                self.scheduler.trusts = self.known.trusts
        else:
            self.worker = WorkerHalf(capsule, layers, empty, slots, rotary, block)
            if opened is not None:
                self.worker.store = StoreWriter(opened[0], opened[1].digest, config.model_type)

    # In the scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        (manager,) = kv_cache_manager.coordinator.single_type_managers
        if not isinstance(manager, CapsuleManager):
            raise ConfigError(
                f"vLLM manages this model's KV cache with {type(manager).__name__}, not with kvcapsule's manager: is"
                " the worker class kvcapsule.serving.worker.CapsuleWorker (--worker-cls), the plug-in kvcapsule loaded"
                " (VLLM_PLUGINS), and the attention backend the CPU's?"
            )
        manager.capsules = self.scheduler

    def on_new_request(self, request: Any) -> None:
        if self.known is not None and request.mm_features:
            self.known.see(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self.scheduler is not None
        if self.known is None or not request.mm_features:
            return 0, False
        # Who asks for the probabilities of the prompt's tokens has to have them computed.
        data = [] if request.skip_reading_prefix_cache else self.known.find(request)
        left = range(num_computed_tokens, request.num_tokens)
        return self.scheduler.plan(
            request.request_id, images_of(request), self.known.images(request), data, left
        ), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self.scheduler is not None
        if request.num_computed_tokens:
            # It waited for the next piece of its input (vLLM's streaming input), and holds its blocks.
            self.scheduler.resume(request.request_id, images_of(request))
        else:
            self.scheduler.begin(request.request_id, images_of(request), num_external_tokens)
        if self.known is not None:
            if request.mm_features:
                # A new piece may have brought more images.
                self.known.see(request)
            self.known.forget(request.request_id)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Also of requests that end while they wait."""
        assert self.scheduler is not None
        if self.known is not None:
            self.known.end(request.request_id)
            self.scheduler.plans.pop(request.request_id, None)
        return False, None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self.scheduler is not None
        scheduled, cached = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return StepMetadata(self.scheduler.step({name: n + scheduled[name] for name, n in computed.items()}))

    # Metrics, in both, and in the process that answers /metrics.

    def get_kv_connector_stats(self) -> CapsuleStats | None:
        if self.scheduler is not None:
            slots, tally = self.scheduler.slots, self.scheduler.tally
            tally.level("pool_used_bytes", slots.used * self.slot_bytes)
            tally.level("pool_total_bytes", slots.count * self.slot_bytes)
        else:
            assert self.worker is not None
            tally = self.worker.tally
        counted = tally.take()
        return CapsuleStats(data=counted) if counted else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CapsuleStats:
        return CapsuleStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> CapsuleMetrics:
        return CapsuleMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self.worker is not None
        self.worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self.worker is not None and isinstance(connector_metadata, StepMetadata)
        self.worker.begin_step(connector_metadata.step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self.worker is not None
        self.worker.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        assert self.worker is not None
        self.worker.end_step()

    def shutdown(self) -> None:
        if self.worker is not None and self.worker.store is not None:
            self.worker.store.close()
