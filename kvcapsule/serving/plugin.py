"""What vLLM calls in each of its processes (entry point vllm.general_plugins): registers what options can choose."""


def register() -> None:
    """Make the connector, the attention backend and the KV cache spec known to vLLM. Without the connector chosen
    nothing changes; with another version of vLLM nothing is registered."""
    from .version import VLLM, installed

    if not (installed() or "").startswith(VLLM + "."):
        return
    import vllm._custom_ops as ops
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from .manager import CapsuleManager, CapsuleSpec
    from .settings import CONNECTOR

    if CONNECTOR in KVConnectorFactory._registry:
        return
    KVConnectorFactory.register_connector(CONNECTOR, "kvcapsule.serving.connector", CONNECTOR)
    # The CPU platform knows one attention backend, so that this one takes its name.
    register_backend(AttentionBackendEnum.CPU_ATTN, "kvcapsule.serving.backend.CapsuleBackend")
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CapsuleSpec, CapsuleManager, FullAttentionSpec)
    _take_permuted_activations(ops)


def _take_permuted_activations(ops: object) -> None:
    """vLLM's oneDNN product wants rows that are dense; vision towers such as SegFormer hand on permuted ones."""
    product = ops.onednn_mm  # type: ignore[attr-defined]
    ops.onednn_mm = lambda handler, x, bias: product(handler, x.contiguous(), bias)  # type: ignore[attr-defined]
