"""What a user of the plug-in may set (kv_connector_extra_config), and which of vLLM's options are refused by name."""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError

CONNECTOR = "CapsuleConnector"
"""The connector's name in vLLM's --kv-transfer-config."""
SCHEDULER = "kvcapsule.serving.scheduler.CapsuleScheduler"
"""For vLLM's --scheduler-cls, where there is an image store."""


@dataclass(frozen=True)
class Settings:
    """The keys of kv_connector_extra_config."""

    capsule: str
    """A folder, the name of a shipped capsule, or a Hub id."""
    pool_bytes: int = 256 * 2**20
    """Memory for capsules of all layers, beside the blocks of the KV cache."""
    image_tokens: int = 0
    """Visual tokens of the image that the lines logged at start-up are about; 0: the smallest that holds a tile."""
    text_tokens: int = 128
    """Other tokens of that sequence."""

    store: str | None = None
    """Folder of an image store; None: there is none."""
    store_max_bytes: int = 2 * 10**9
    """Most bytes of it."""

    @classmethod
    def of(cls, vllm_config: Any) -> "Settings":
        """Those of an engine. Raises ConfigError for keys and values that there are not."""
        values = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ConfigError(f"kv_connector_extra_config has no {', '.join(unknown)}; it has {', '.join(names)}.")
        if "capsule" not in values:
            raise ConfigError("kv_connector_extra_config names no capsule: give a folder, a shipped name, or a Hub id.")
        settings = cls(**values)
        if not isinstance(settings.pool_bytes, int) or settings.pool_bytes < 1:
            raise ConfigError(f"pool_bytes {settings.pool_bytes!r}: give the bytes of the capsule pool, at least 1.")
        for name in ("image_tokens", "text_tokens"):
            if not isinstance(value := getattr(settings, name), int) or value < 0:
                raise ConfigError(f"{name} {value!r}: give a number of tokens.")
        if settings.store is not None and not (isinstance(settings.store, str) and settings.store):
            raise ConfigError(f"store {settings.store!r}: name a folder for the image store.")
        most = settings.store_max_bytes
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise ConfigError(f"store_max_bytes {most!r}: give the most bytes that the image store may hold.")
        return settings


def is_chosen(vllm_config: Any) -> bool:
    """Whether an engine was told to use capsules."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return transfer is not None and transfer.kv_connector == CONNECTOR


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises ConfigError that names the first option of an engine that has not been tested with capsules."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    refused = {
        "tensor parallelism (--tensor-parallel-size)": parallel.tensor_parallel_size > 1,
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "LoRA (--enable-lora)": vllm_config.lora_config is not None,
        "a quantised KV cache (--kv-cache-dtype)": cache.cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
        "CUDA graphs and compilation (pass --enforce-eager)": not vllm_config.model_config.enforce_eager,
        "model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "steps that are scheduled ahead (pass --no-async-scheduling)": vllm_config.scheduler_config.async_scheduling,
        "models that are no vision-language models": vllm_config.model_config.multimodal_config is None,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ConfigError(f"capsules in vLLM do not work with {what} yet: leave it out.")
