"""vLLM engines in the tests' own process, with and without capsules, and what they hold. Imports vLLM."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.checkpoints import shipped
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.serving.backend import CapsuleBackend
from kvcapsule.serving.settings import CONNECTOR, SCHEDULER
from kvcapsule.testbeds.pages import pages
from kvcapsule.vlm.geometry import KVGeometry

BLOCK = 32
WORKER = "kvcapsule.serving.worker.CapsuleWorker"
POOL = 64 * 2**20


def identity_capsule(model: str, tile: int, folder: Path) -> str:
    """A saved capsule that stores all keys and values as they are."""
    geometry = KVGeometry.from_config(AutoConfig.from_pretrained(shipped(model) or model))
    config = CapsuleConfig(
        family="identity",
        codec=IdentityConfig(tile=tile),
        geometry=geometry,
        base_model=model,
        base_revision=None,
        metadata={},
    )
    Capsule(config).save_pretrained(folder)
    return str(folder)


def capsule_options(capsule: str, pool_bytes: int = POOL, **more: Any) -> dict[str, Any]:
    """The options of vLLM that choose capsules."""
    extra = {"capsule": capsule, "pool_bytes": pool_bytes, **more}
    transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    scheduler = {"scheduler_cls": SCHEDULER} if "store" in more else {}
    return {"worker_cls": WORKER, "kv_transfer_config": transfer, **scheduler}


def question(row: dict[str, Any]) -> dict[str, Any]:
    """A page and a question about it, as vLLM takes them."""
    return {
        "prompt": f"<|user|><image>{row['prompt']}<|assistant|>",
        "multi_modal_data": {"image": row["image"]},
    }


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [question(row) for row in pages("test", count, seed)]


@dataclass
class Engine:
    """An engine, and what happened in it."""

    llm: LLM
    running: list[int] = field(default_factory=list)
    """Sequences of each step."""
    preempted: int = 0

    def __post_init__(self) -> None:
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            if out.num_scheduled_tokens:
                self.running.append(len(out.num_scheduled_tokens))
            return out

        def preempting(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler.schedule, self.scheduler._preempt_request = counted, preempting

    @property
    def half(self) -> Any:
        """The connector's half in the scheduler."""
        return self.scheduler.connector.scheduler

    @property
    def worker(self) -> Any:
        """The connector's half in the worker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    @property
    def known(self) -> Any:
        """The image store as the scheduler asks it."""
        return self.scheduler.connector.known

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def blocks(self) -> int:
        """Those that can be had: one is the null block."""
        return int(self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    def ask(self, prompts: Sequence[dict[str, Any]], **sampling: Any) -> list[Any]:
        options = {"max_tokens": 120, "temperature": 0.0, **sampling}
        return self.llm.generate(list(prompts), SamplingParams(**options), use_tqdm=False)

    def texts(self, prompts: Sequence[dict[str, Any]], **sampling: Any) -> list[str]:
        return [out.outputs[0].text for out in self.ask(prompts, **sampling)]

    def require_empty(self) -> None:
        """Every block and every slot is free, and nothing is remembered of any request."""
        assert self.free_blocks == self.blocks
        assert self.half.slots.used == 0 and self.half.requests == {} and self.half.plans == {}


class Engines:
    """Makes engines, one after the other."""

    def __init__(self) -> None:
        self.now: Engine | None = None

    def __call__(
        self, capsule: str | None = None, pool_bytes: int = POOL, store: Path | None = None, **options: Any
    ) -> Engine:
        """An engine for pages-vlm; capsule: None for vLLM as it is; store: folder of an image store."""
        self.close()
        more = {} if store is None else {"store": str(store), "store_max_bytes": 10**9}
        chosen = {} if capsule is None else capsule_options(capsule, pool_bytes, **more)
        defaults: dict[str, Any] = {
            "model": str(shipped("pages-vlm")),
            "model_impl": "transformers",
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 64,
            "enforce_eager": True,
            "block_size": BLOCK,
            "enable_prefix_caching": False,
            "limit_mm_per_prompt": {"image": 2},
            "kv_cache_memory_bytes": 64 * 2**20,
            "seed": 0,
        }
        self.now = Engine(LLM(**{**defaults, **chosen, **options}))
        if store is not None:
            # Until then every image is a miss.
            assert self.now.known.files.wait() is not None
        return self.now

    def close(self) -> None:
        """Shut the engine down, or clear away what one that did not start has left."""
        if self.now is not None:
            self.now.llm.llm_engine.engine_core.shutdown()
            self.now = None
        ensure_kv_transfer_shutdown()
        CapsuleBackend.chosen = False
        cleanup_dist_env_and_memory()
        gc.collect()
