"""A worker of vLLM that lets the connector see the model runner: which request is in which row of a batch."""

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.worker.cpu_worker import CPUWorker

from ..errors import ConfigError
from .backend import CapsuleBackend
from .connector import CapsuleConnector
from .settings import CONNECTOR, is_chosen, refuse_unsupported
from .version import require_supported_vllm


class CapsuleWorker(CPUWorker):
    """Named by vLLM's option worker_cls."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if not is_chosen(vllm_config):
            raise ConfigError(
                f"CapsuleWorker serves with the connector {CONNECTOR} alone: name it in --kv-transfer-config."
            )
        # The connector is made once the model is loaded and compiled: too late to say what does not work.
        require_supported_vllm()
        refuse_unsupported(vllm_config)
        CapsuleBackend.chosen = True
        super().__init__(vllm_config, *args, **kwargs)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """After this the connector is there, and gets the runner."""
        super().initialize_from_config(kv_cache_config)
        connector = get_kv_transfer_group()
        assert isinstance(connector, CapsuleConnector) and connector.worker is not None
        connector.worker.runner = self.model_runner
