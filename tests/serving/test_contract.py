"""What kvcapsule/serving takes for granted of vLLM. Where one of these fails on another version of vLLM, its docstring
says where to look."""

import inspect
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from support.serving_engine import Engines, questions
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.multimodal.cache import shm
from vllm.multimodal.inputs import PlaceholderRange
from vllm.platforms import current_platform
from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_general_plugins
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.cpu_worker import CPUWorker

from kvcapsule.errors import ModelError
from kvcapsule.serving import paged_cache, plugin, version
from kvcapsule.serving.backend import CapsuleBackend, CapsuleImpl, CapsuleMetadataBuilder
from kvcapsule.serving.connector import CapsuleConnector
from kvcapsule.serving.known_images import _ELSEWHERE
from kvcapsule.serving.manager import CapsuleManager, CapsuleSpec
from kvcapsule.serving.paged_cache import PagedCache, check_layout
from kvcapsule.serving.scheduler_half import images_of
from kvcapsule.serving.settings import CONNECTOR


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    load_general_plugins()


def test_vllm_loads_the_plug_in() -> None:
    """vllm/plugins: the group of entry points that every process loads."""
    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    (own,) = [entry for entry in entry_points(group=DEFAULT_PLUGINS_GROUP) if entry.name == "kvcapsule"]
    assert own.load() is plugin.register


def test_registering_again_changes_nothing() -> None:
    """kvcapsule/serving/plugin.py: vLLM may load plug-ins twice in a process."""
    product = ops.onednn_mm
    plugin.register()
    assert ops.onednn_mm is product


def test_another_version_is_left_alone_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """kvcapsule/serving/version.py: raise VLLM once these tests pass on the new version."""
    monkeypatch.setattr(version, "version", lambda name: "0.33.0")
    monkeypatch.setattr(KVConnectorFactory, "_registry", {})
    plugin.register()
    assert KVConnectorFactory._registry == {}
    with pytest.raises(ModelError, match=r"serves with vLLM 0\.32, and 0\.33\.0 is installed: run `pip install"):
        version.require_supported_vllm()


def test_the_connector_is_known_by_name() -> None:
    """vllm/distributed/kv_transfer/kv_connector/factory.py: register_connector(name, module, class)."""
    config = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_module_path=None)
    assert KVConnectorFactory.get_connector_class(config) is CapsuleConnector


def test_the_cpu_takes_the_backend_that_is_registered_under_its_name() -> None:
    """vllm/platforms/cpu.py get_attn_backend_cls: the CPU has one backend for attention without MLA, CPU_ATTN."""
    chosen = SimpleNamespace(use_sparse=False, use_mla=False)
    assert current_platform.is_cpu()
    path = current_platform.get_attn_backend_cls(None, chosen)
    assert path == AttentionBackendEnum.CPU_ATTN.get_path() == "kvcapsule.serving.backend.CapsuleBackend"
    assert AttentionBackendEnum.CPU_ATTN.get_class() is CapsuleBackend


def test_a_backend_may_change_the_spec_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm/v1/attention/backend.py customize_spec (said to be temporary): who calls it, and replace_as."""
    assert parameters(AttentionBackend.customize_spec) == ["spec"]
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    assert CapsuleBackend.customize_spec(spec) is spec
    monkeypatch.setattr(CapsuleBackend, "chosen", True)
    changed = CapsuleBackend.customize_spec(spec)
    assert type(changed) is CapsuleSpec and changed.page_size_bytes == spec.page_size_bytes
    assert changed == replace_as(spec, CapsuleSpec)


def test_the_spec_has_the_manager() -> None:
    """vllm/v1/kv_cache_spec_registry.py: register(spec, manager, base); specs of one base share a group."""
    spec = CapsuleSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    assert KVCacheSpecRegistry.get_manager_class(spec) is CapsuleManager


def test_what_the_manager_overrides() -> None:
    """vllm/v1/core/single_type_kv_cache_manager.py: how blocks are freed from the middle, and when blocks enter the
    prefix cache."""
    of = SingleTypeKVCacheManager
    assert parameters(of.new_step_starts) == ["self"]
    assert parameters(of.pop_blocks_for_free) == ["self", "request_id"]
    expected = ["self", "request", "num_tokens", "retention_interval", "replay_boundaries"]
    assert parameters(FullAttentionManager.cache_blocks) == parameters(CapsuleManager.cache_blocks) == expected


def test_what_the_connector_overrides() -> None:
    """vllm/distributed/kv_transfer/kv_connector/v1/base.py: the methods that are called in the scheduler and in
    workers, and that no other is abstract."""
    assert not getattr(CapsuleConnector, "__abstractmethods__", None)
    own = [name for name, value in vars(CapsuleConnector).items() if inspect.isfunction(value) and name[0] != "_"]
    for name in own:
        base = parameters(getattr(KVConnectorBase_V1, name))
        assert parameters(getattr(CapsuleConnector, name)) == base, name
    assert {role.name for role in KVConnectorRole} == {"SCHEDULER", "WORKER"}


def test_what_the_worker_and_backend_override() -> None:
    """vllm/v1/worker/cpu_worker.py and vllm/v1/attention/backends/cpu_attn.py."""
    assert "kv_cache_config" in parameters(CPUWorker.initialize_from_config)
    names = parameters(CPUAttentionBackendImpl.forward)
    assert parameters(CapsuleImpl.forward)[:-1] == names[:7] and names[7] == "output"
    builder = CapsuleMetadataBuilder.__mro__[1]
    assert parameters(CapsuleMetadataBuilder.build) == parameters(builder.build)
    fields = CPUAttentionMetadata.__dataclass_fields__
    assert {"seq_lens", "query_start_loc", "causal", "scheduler_metadata"} <= set(fields)


def test_the_kernels_schedule_takes_these_arguments() -> None:
    """vllm/_custom_ops.py cpu_attn_get_scheduler_metadata: CapsuleMetadataBuilder.for_lengths calls it as the CPU
    backend's builder does."""
    source = inspect.getsource(CapsuleMetadataBuilder.__mro__[1])
    for name in parameters(ops.cpu_attn_get_scheduler_metadata):
        assert f"{name}=" in source, name


def test_the_builder_hands_its_kernels_to_the_layers_once_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm/v1/attention/backends/cpu_attn.py: CapsuleMetadataBuilder takes vectors' kernels in place of AMX's there."""
    base = CapsuleMetadataBuilder.__mro__[1]
    source = inspect.getsource(base.__init__)
    assert source.index("self.isa = _get_attn_isa(") < source.index("self._set_isa_to_layers(layer_names)")
    given = []
    monkeypatch.setattr(base, "_set_isa_to_layers", lambda self, names: given.append(self.isa))
    builder = CapsuleMetadataBuilder.__new__(CapsuleMetadataBuilder)
    for chosen in (False, True):
        monkeypatch.setattr(CapsuleBackend, "chosen", chosen)
        builder.isa = "amx"
        builder._set_isa_to_layers([])
    assert given == ["amx", "vec"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(2, 32), (1, 64), (4, 128)])
@pytest.mark.parametrize("block", [32, 64])
def test_the_order_within_a_block(dtype: torch.dtype, heads: int, dim: int, block: int) -> None:
    """csrc/cpu of vLLM: keys lie channel by channel within a block and head, values token by token."""
    check_layout(dtype, heads, block, dim)


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """kvcapsule/serving/paged_cache.py check_layout."""
    read = PagedCache.read
    monkeypatch.setattr(paged_cache.PagedCache, "read", lambda self, blocks: read(self, blocks)[::-1])
    with pytest.raises(ModelError, match="lays out its KV cache in an order that is not known here"):
        check_layout(torch.float32, 2, 32, 32)


def test_ranges_of_embeddings_include_their_ends() -> None:
    """vllm/multimodal/inputs.py PlaceholderRange.extract_embeds_range."""
    whole = PlaceholderRange(offset=1, length=196)
    assert whole.extract_embeds_range() == [(1, 196)]
    cut = PlaceholderRange(offset=2, length=5, is_embed=torch.tensor([False, True, False, True, True]))
    request = SimpleNamespace(mm_features=[SimpleNamespace(mm_position=place) for place in (whole, cut)])
    assert images_of(request) == [(1, 196), (3, 1), (5, 2)]


def test_what_an_image_store_overrides() -> None:
    """vllm/v1/core: the scheduler asks how many tokens of a request with images a step may have; the manager counts and
    takes the blocks of what a connector loads."""
    asks = ["self", "request", "num_computed_tokens", "num_new_tokens"]
    assert parameters(AsyncScheduler._try_schedule_encoder_inputs)[:4] == asks
    assert parameters(SingleTypeKVCacheManager.get_num_blocks_to_allocate)[:6] == [
        "self",
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "total_computed_tokens",
        "num_local_computed_tokens",
    ]
    counts = ["self", "request_id", "num_local_computed_tokens", "num_external_computed_tokens", "record_for_zeroing"]
    assert parameters(SingleTypeKVCacheManager.allocate_external_computed_blocks) == counts


def test_values_that_are_elsewhere_are_known_by_name() -> None:
    """vllm/multimodal/cache/shm.py: what stands in place of an image's values in memory that processes share."""
    assert f'"{_ELSEWHERE}"' in inspect.getsource(shm)


def test_a_step_calls_the_connector_in_this_order(
    engines: Engines, tile32: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm/v1/core/sched/scheduler.py and vllm/v1/worker/kv_connector_model_runner_mixin.py: what is called when, and
    with what."""
    calls: list[str] = []
    for of, name in (
        (CapsuleConnector, "bind_kv_cache_manager"),
        (CapsuleConnector, "register_kv_caches"),
        (CapsuleConnector, "get_num_new_matched_tokens"),
        (CapsuleConnector, "update_state_after_alloc"),
        (CapsuleConnector, "build_connector_meta"),
        (CapsuleConnector, "bind_connector_metadata"),
        (CapsuleConnector, "wait_for_save"),
        (CapsuleManager, "new_step_starts"),
        (CapsuleManager, "cache_blocks"),
        (CapsuleManager, "pop_blocks_for_free"),
    ):
        method = getattr(of, name)

        def noted(self: Any, *args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            calls.append(_name)
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(of, name, noted)
    engine = engines(tile32, enable_prefix_caching=True)
    assert calls.index("register_kv_caches") < calls.index("bind_kv_cache_manager")
    calls.clear()
    engine.texts(questions(1), max_tokens=2)
    step = ["build_connector_meta", "bind_connector_metadata", "wait_for_save"]
    first = ["new_step_starts", "get_num_new_matched_tokens", "cache_blocks", "update_state_after_alloc"]
    assert calls[: len(first) + 3] == [*first, *step]
    assert calls[len(first) + 3 :][:5] == ["new_step_starts", "cache_blocks", *step]
    assert calls.count("pop_blocks_for_free") == 1


def test_rows_of_a_batch_have_their_requests_names(
    engines: Engines, tile32: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm/v1/worker/gpu_model_runner.py (model runner V1): input_batch.req_ids is in the order of the rows, and
    block_table[0] has a row for each."""
    engine = engines(tile32)
    batch = engine.worker.runner.input_batch
    seen: list[tuple[list[str], Any]] = []
    attend = CapsuleImpl.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = list(batch.req_ids)
        seen.append((names, batch.block_table[0].get_numpy_array()[: len(names)].copy()))
        held = engine.worker.runner.requests
        for row, name in enumerate(names):
            (blocks,) = held[name].block_ids
            assert seen[-1][1][row, : len(blocks)].tolist() == blocks
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(CapsuleImpl, "forward", forward)
    engine.texts(questions(3), max_tokens=4)
    assert max(len(names) for names, _ in seen) == 3
